"""Whole training step of a Linear layer on this machine's CPU: dense against packed, paired and interleaved.

    python benchmarks/packed_linear.py [--sizes 1024 4096] [--batch 60] [--threads 2] [--pairs 41]

A step is forward, input and weight gradient, and fused Adam; data are random. The ratio is dense time / packed time,
median over the pairs with its 95% interval (order statistics), after `pack_` with a sample, which may choose masked.
"""

import argparse
import sys
import time

import torch
from torch import nn

import lth_sparse as lth

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def make_step(layer: nn.Linear, batch: int):
    """A closure that trains `layer` for one step on fixed random data."""
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    x = torch.randn(batch, layer.in_features).requires_grad_()
    dy = torch.randn(batch, layer.out_features)

    def step():
        optimizer.zero_grad()
        layer(x).backward(dy)
        optimizer.step()

    return step


def seconds(step) -> float:
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def interval(ratios: list[float]) -> tuple[float, float, float]:
    """Median and its distribution-free 95% interval."""
    ordered, n = sorted(ratios), len(ratios)
    half = int(0.98 * n**0.5)
    return ordered[n // 2], ordered[max(0, n // 2 - half)], ordered[min(n - 1, n // 2 + half)]


def row(size: int, sparsity: float, batch: int, pairs: int) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    dense, packed = nn.Linear(size, size), lth.sparsify_(nn.Linear(size, size))
    if sparsity:
        lth.prune_(packed, sparsity)
    lth.pack_(packed, torch.randn(batch, size))
    steps = make_step(dense, batch), make_step(packed, batch)
    times = [[seconds(step) for step in steps] for _ in range(pairs + 2)][2:]  # the first two warm up
    median, low, high = interval([ours / theirs for ours, theirs in times])
    milliseconds = 1000 * sorted(theirs for _, theirs in times)[pairs // 2]
    state = lth.summary(packed)[0].strategy
    ratio = f"{median:.2f} | {low:.2f} to {high:.2f}"
    return f"| {size} x {size} | {sparsity:.0%} | {state} | {ratio} | {milliseconds:.2f} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    settings = f"batch {options.batch}, {options.threads} threads, n = {options.pairs} pairs, torch {torch.__version__}"
    sys.stdout.write(f"{settings}\n\n| layer | sparsity | strategy | dense / packed | 95% interval | packed ms |\n")
    sys.stdout.write("|---|---:|---|---:|---:|---:|\n")
    for size in options.sizes:
        for sparsity in SPARSITIES:
            sys.stdout.write(row(size, sparsity, options.batch, options.pairs) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
