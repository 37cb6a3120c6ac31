"""What sparse training gains on the layers of your network: `python benchmark_your_layer.py 300x784 1024x1024`.

Training steps (forward, both gradients, Adam) of a Linear layer, timed in turns: how many times faster ours is than the
dense layer with fused Adam, and than `torch.nn.utils.prune` with Adam. A ratio below 1 is a loss.
"""

import argparse

import torch
from lth_sparse.benchmarks.layers import training_step
from lth_sparse.benchmarks.paired import Ratio, ratio, seconds
from lth_sparse.benchmarks.shapes import Shape

OURS = ("ours: masked", "ours: chosen")
THEIRS = ("dense, fused Adam", "torch.nn.utils.prune")


def measure(shape: Shape, density: float, rounds: int, device: torch.device) -> dict[tuple[str, str], Ratio]:
    """How many times faster each of OURS is than each of THEIRS, with the 95% interval of the median."""
    steps = [training_step(shape, name, density, device)[0] for name in (*THEIRS, *OURS)]
    times = dict(zip((*THEIRS, *OURS), seconds(steps, rounds, inner=5), strict=True))
    return {(ours, theirs): ratio(times[theirs], times[ours]) for ours in OURS for theirs in THEIRS}


def main(layers=("300x784", "1024x1024"), batch: int = 60, sparsity: float = 0.95, rounds: int = 15) -> list[Ratio]:
    """Print a row for each layer, OUTPUTSxINPUTS, and each pair; the ratios in that order."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = []
    print(f"{'layer':>12}  {'ours':12}  {'against':20}  times faster, {sparsity:.0%} pruned")
    for text in layers:
        outputs, inputs = map(int, text.split("x"))
        shape = Shape("linear", (inputs, outputs), (batch, inputs))
        for (ours, theirs), gain in measure(shape, 1 - sparsity, rounds, device).items():
            print(f"{text:>12}  {ours:12}  {theirs:20}  {gain}")
            found.append(gain)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What sparse training gains on the layers of your network.")
    parser.add_argument("layers", nargs="*", default=["300x784", "1024x1024"], help="OUTPUTSxINPUTS of Linear layers")
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument("--rounds", type=int, default=15, help="pairs of timings")
    main(**vars(parser.parse_args()))
