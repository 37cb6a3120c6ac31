"""What every test runs under: poisoned memory, one thread, Triton's interpreter and no gpu test without a GPU."""

import os
import sys

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel module is first imported

settings.register_profile("house", deadline=None)  # the first example of a property pays for torch's warm-up
settings.load_profile("house")


@pytest.fixture(autouse=True)
def poison():
    """Fill every empty tensor with NaN, so that an output nobody wrote cannot pass for a right one."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(False)  # a benchmark that a test ran may have left it on
    yield
    if "torch._dynamo" in sys.modules:  # it compiles a function eight times, then refuses, whichever test asks
        torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
