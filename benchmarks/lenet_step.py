"""A training step of LeNet-300-100 as a user would write it: our layers against `torch.nn.utils.prune`.

    python benchmarks/lenet_step.py [--batch 60] [--threads 2] [--pairs 41]

Theirs: `torch.nn.utils.prune` masks and torch's Adam as it comes. Ours: `sparsify_`, `prune_`, `pack_` with a sample,
and the Adam of `lth_sparse`. Beside it the same dense network with either Adam. Data are random, masks too; ratios are
times / ours, medians over interleaved steps with their 95% intervals.
"""

import argparse
import copy
import sys

import torch
import torch.nn.functional as F
from lth_sparse.benchmarks.paired import ratio, seconds
from torch import nn
from torch.nn.utils import prune

import lth_sparse as lth

DENSITIES = (1.0, 0.8, 0.512, 0.211, 0.107, 0.036, 0.012)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
    return nn.Sequential(*layers)


def make_step(model, optimizer, batch: int):
    """A closure that trains `model` for one step on fixed random data."""
    x, labels = torch.rand(batch, 784), torch.randint(10, (batch,))

    def step():
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()

    return step


def row(density: float, options) -> str:
    """One line of the table."""
    dense, theirs, ours = network(), network(), lth.sparsify_(network())
    if density < 1:
        lth.prune_(ours, 1 - density, score="random")
    for layer, masked in zip(theirs[::2], ours[::2], strict=True):
        prune.custom_from_mask(layer, "weight", masked.weight_mask)
    lth.pack_(ours, torch.rand(options.batch, 784))
    contestants = [
        (theirs, torch.optim.Adam(theirs.parameters(), 1.2e-3)),
        (dense, torch.optim.Adam(dense.parameters(), 1.2e-3)),
        (fused := copy.deepcopy(dense), torch.optim.Adam(fused.parameters(), 1.2e-3, fused=True)),
        (ours, lth.optim.Adam(ours.parameters(), 1.2e-3)),
    ]
    times = seconds([make_step(*each, options.batch) for each in contestants], options.pairs, inner=10)
    states = "/".join(line.strategy for line in lth.summary(ours) if line.strategy)
    return f"| {density:.1%} | {states} | " + " | ".join(str(ratio(other, times[-1])) for other in times[:-1]) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=41)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.set_flush_denormal(True)
    settings = f"batch {options.batch}, {options.threads} threads, n = {options.pairs} pairs, torch {torch.__version__}"
    head = "| density | strategies | torch.nn.utils.prune, Adam | dense, Adam | dense, fused Adam |"
    sys.stdout.write(f"{settings}\n\n{head}\n|---:|---|---:|---:|---:|\n")
    for density in DENSITIES:
        sys.stdout.write(row(density, options) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
