"""How many launches a training step of a stack takes on CUDA, counted where there is none: nothing computes here."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lth_sparse as lth
from lth_sparse import models
from lth_sparse.data import Data, Split
from lth_sparse.ops import strategy
from lth_sparse.recipe import Recipe
from lth_sparse.training.programs import Programs
from lth_sparse.training.stack import Stack

FREE = ("view", "empty", "expand", "detach", "alias", "select", "slice", "unsqueeze", "permute", "t", "transpose")
FREE += ("split", "squeeze", "record", "lift")  # what computes nothing on the device

interpreter = pytest.importorskip("triton.runtime.interpreter")


class Counted(TorchDispatchMode):
    """Counts operators that would launch a kernel, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name.strip("_").split("_")[0] not in FREE:
            self.names.append(name)
        return function(*args, **kwargs or {})


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels that are launched, on tensors of the CPU, and not run."""
    if torch.cuda.is_available():
        pytest.skip("on CUDA they would run")
    names = []
    monkeypatch.setattr(strategy, "DEVICE_TYPES", {"cpu"})
    executor = interpreter.GridExecutor
    monkeypatch.setattr(executor, "__call__", lambda grid, *args, **kwargs: names.append(grid.fn.__name__))
    return names


def stack(tickets, activation="relu", kind=Stack, strategies=None):
    split = Split(torch.zeros(100, 1, 28, 28, dtype=torch.uint8), torch.zeros(100, dtype=torch.long))
    data = Data("levels", split, split, split, (1, 28, 28), 10, "unit", torch.ones(1), torch.zeros(1))
    networks = [
        lth.prune_(lth.sparsify_(models.build("lenet-300-100", activation=activation)), 0.9) for _ in range(tickets)
    ]
    return kind(networks, data, Recipe(device="cpu", threads=1), strategies or {})


@pytest.mark.parametrize("tickets", [1, 16])
@pytest.mark.parametrize("activation, launches", [("relu", 11), ("sigmoid", 15)])
def test_a_step_of_lenet_takes_few_launches(launched, tickets, activation, launches):
    learner, indices = stack(tickets, activation), torch.zeros(tickets, 60, dtype=torch.long)
    learner.step(indices)  # makes the optimizer's state
    launched.clear()
    with Counted() as torchs:
        learner.step(indices)
    assert len(launched) == 11 and len(launched) + len(torchs.names) == launches <= 15, (launched, torchs.names)


def test_many_steps_of_programs_take_two_launches(launched):
    learner = stack(2, kind=Programs, strategies=dict.fromkeys(("fc1", "fc2", "output"), "trainer"))
    indices = torch.zeros(25, 2, 60, dtype=torch.long)
    learner.step(indices[0])  # asks the optimizer once for its steps
    launched.clear()
    with Counted() as torchs:
        learner.steps(indices, [0.1] * 25)
    assert launched == ["_train_kernel"] and torchs.names == ["_foreach_add_"]  # which counts the steps


def test_the_bytes_of_a_step_are_near_the_least(launched):
    learner = stack(15)
    weights = sum(layer.values.nbytes for layer in learner.layers)
    assert weights == 15 * 4 * 266_200
    moved = 2 * weights + math.prod((15, 266_200)) + weights + 7 * weights  # products, gradient and mask, Adam
    assert moved / 4.3e12 < 50e-6, "of an H200's bandwidth a step takes less than 50 us"
