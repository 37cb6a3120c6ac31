"""For `pytest benchmarks/test_layers.py`: what machine the timings of pytest-benchmark are from."""

import torch
from lth_sparse.benchmarks.records import origin


def pytest_benchmark_update_machine_info(config, machine_info):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = torch.get_float32_matmul_precision()
    machine_info["lth_sparse"] = origin(device) | {"threads": torch.get_num_threads(), "float32 products": precision}
