"""Whole training step of a Linear layer, dense against packed, paired and interleaved, with the roofline beside it.

    python benchmarks/packed_linear.py [--sizes 1024 4096] [--batch 60] [--threads 2] [--pairs 41] [--device cpu]

A step is forward, input and weight gradient, and fused Adam; data are random. The ratio is dense time / packed time,
median over the pairs with its 95% interval (order statistics), after `pack_` with a sample, which may choose masked.
The limit is the time in which the machine, at its measured bandwidth and rate, could do that step at best.
"""

import argparse
import sys
from statistics import median

import torch
from lth_sparse.benchmarks.paired import ratio, seconds
from torch import nn

import lth_sparse as lth
from lth_sparse import costs
from lth_sparse.dispatch import Layer

SPARSITIES = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def make_step(layer: nn.Linear, batch: int):
    """A closure that trains `layer` for one step on fixed random data."""
    device = layer.bias.device
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    x = torch.randn(batch, layer.in_features, device=device).requires_grad_()
    dy = torch.randn(batch, layer.out_features, device=device)

    def step():
        optimizer.zero_grad()
        layer(x).backward(dy)
        optimizer.step()

    return step


def row(size: int, sparsity: float, options) -> str:
    """One line of the table."""
    torch.manual_seed(0)
    dense, packed = (nn.Linear(size, size).to(options.device) for _ in range(2))
    lth.sparsify_(packed)
    if sparsity:
        lth.prune_(packed, sparsity)
    masks = packed.weight_mask[None]
    lth.pack_(packed, torch.randn(options.batch, size, device=options.device))
    strategy = lth.summary(packed)[0].strategy
    theirs, ours = seconds([make_step(layer, options.batch) for layer in (dense, packed)], options.pairs)
    layer = Layer("linear", masks, (size,), torch.float32, (options.batch, size))
    machine = costs.machine(masks.device, torch.float32, torch.get_num_threads())
    limit = costs.least_seconds(costs.step_cost(layer, strategy), machine)
    times = f"{1000 * median(ours):.2f} | {1000 * limit:.2f}"
    return f"| {size} x {size} | {sparsity:.0%} | {strategy} | {ratio(theirs, ours)} | {times} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=41)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    settings = f"batch {options.batch}, {options.threads} threads, n = {options.pairs} pairs, torch {torch.__version__}"
    sys.stdout.write(f"{settings}\n\n| layer | sparsity | strategy | dense / packed (95%) | packed ms | limit ms |\n")
    sys.stdout.write("|---|---:|---|---:|---:|---:|\n")
    for size in options.sizes:
        for sparsity in options.sparsities:
            sys.stdout.write(row(size, sparsity, options) + "\n")
            sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
