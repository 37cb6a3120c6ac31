"""Bytes resident and moved, and flops, of a training step with Adam, by strategy and sparsity, and the machine's limit.

    python benchmarks/costs.py [--batch 60] [--device cpu]
    python benchmarks/costs.py --lenet [--batch 60]

Counted from the index structures of random masks (`lth_sparse.costs`), not measured. Percentages are of the dense
layer: weight, gradient and two moments in float32. The limit is the larger of bytes over the bandwidth and flops over
the rate of float32 products that torch reaches on this machine. `--lenet`: launches and bytes of a step of whole
networks on CUDA, and the time that an H200 needs to move these.
"""

import argparse
import sys
from collections.abc import Iterator
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import lth_sparse as lth
from lth_sparse import costs, models
from lth_sparse.data import Data, Split
from lth_sparse.dispatch import Layer
from lth_sparse.ops import STRATEGIES
from lth_sparse.recipe import Recipe
from lth_sparse.training import programs
from lth_sparse.training.graph import STEPS
from lth_sparse.training.stack import Stack

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)
ROUNDS = (0, 3, 7, 12, 15, 18)  # of pruning, to the densities of the paper's Figure 3
TICKETS = (1, 16, 132)
BANDWIDTH = 4.3e12  # bytes per second that copies reach on an H200, of 4.8 by the data sheet


def layers(batch: int) -> dict[str, Layer]:
    """A Linear and a convolution, with full masks."""
    conv = (256, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    linear_masks, conv_masks = (torch.ones(shape, dtype=torch.bool) for shape in ((1, 4096, 4096), (1, 256, 3, 3, 256)))
    return {
        "Linear 4096 x 4096": Layer("linear", linear_masks, (4096,), torch.float32, (batch, 4096)),
        "Conv2d 256 x 256 x 3 x 3 on 8 x 8": Layer("conv2d", conv_masks, conv, torch.float32, (batch, 256, 8, 8)),
    }


def rows(name: str, layer: Layer, machine: costs.Machine) -> Iterator[str]:
    """The lines of one layer's table."""
    dense = 16 * layer.masks.numel()
    for sparsity in SPARSITIES:
        generator = torch.Generator().manual_seed(0)
        masks = torch.rand(layer.masks.shape, generator=generator) >= sparsity
        for strategy in ("masked", *STRATEGIES[layer.kind]):
            cost = costs.step_cost(layer._replace(masks=masks), strategy)
            resident = f"{cost.resident / 1e6:.1f} | {cost.resident / dense:.0%}"
            work = f"{cost.bytes / 1e6:.1f} | {cost.flops / 1e9:.2f} | {1e3 * costs.least_seconds(cost, machine):.2f}"
            yield f"| {sparsity:.0%} | {strategy} | {resident} | {work} |"


def lenet(pruned: int) -> torch.nn.Module:
    """LeNet-300-100 after that many rounds, with random masks."""
    model = lth.sparsify_(models.build("lenet-300-100"))
    for _ in range(pruned):
        lth.prune_(model, rates=models.pruning_rates(model), score="random")
    return model


def lenet_bytes(model: torch.nn.Module, how: str, batch: int) -> int:
    """Bytes that a step of one ticket must read and write, each tensor once a launch, or phase of the trainer."""
    masked = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    inputs, outputs = batch * masked[0].in_features, 4 * batch * masked[-1].out_features
    pixel = 1 if how == "trainer" else 4  # bytes: the trainer's images stay uint8
    moved = inputs * (1 + pixel) + 2 * outputs + 24 * batch  # gathering; the loss; indices twice, and labels
    for depth, layer in enumerate(masked):
        size, x, y = pixel if depth == 0 else 4, batch * layer.in_features, 4 * batch * layer.out_features
        values, forward, weight_gradient, input_gradient = _of_weights(layer.weight_mask, how)
        moved += forward + weight_gradient + 2 * (size * x + y)
        moved += input_gradient + y + 2 * size * x if depth else 0  # and the ReLU's output
        moved += 28 * values + (4 + 4 + 28) * layer.out_features  # Adam, and the bias
    return moved


def _of_weights(mask, how):
    """Values of a layer, and the bytes of weights and their indices that its three products move."""
    if how == "masked":
        return mask.numel(), 4 * mask.numel(), (1 + 4) * mask.numel(), 4 * mask.numel()
    indices = [tensor.nbytes for tensor in STRATEGIES["linear"]["csr"].structures(mask[None], ())]
    values = int(mask.sum())
    by_row, by_column = 4 * values + sum(indices[:3]), 4 * values + sum(indices[3:])
    return values, by_row, by_row, by_column


class _Operators(TorchDispatchMode):
    """Counts torch's operators that compute: no views, no fresh memory, no marks for a profiler."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and not any(free in function.__name__ for free in ("empty", "record"))
        return function(*args, **kwargs or {})


def lenet_launches(model: torch.nn.Module, how: str, batch: int, tickets: int) -> float:
    """Launches of a step of that many tickets on CUDA; the kernels do not run."""
    from lth_sparse.benchmarks.compiled import recorded

    split = Split(torch.zeros(100, 1, 28, 28, dtype=torch.uint8), torch.zeros(100, dtype=torch.long))
    data = Data("levels", split, split, split, (1, 28, 28), 10, "unit", torch.ones(1), torch.zeros(1))
    recipe = Recipe(device="cpu", batch_size=batch)
    indices = torch.zeros(STEPS, tickets, batch, dtype=torch.long)
    with patch("lth_sparse.ops.strategy.DEVICE_TYPES", {"cpu"}), recorded() as kernels:
        kind = programs.Programs if how == "trainer" else Stack
        learner = kind([model] * tickets, data, recipe, {name: how for name, _ in model.named_modules()})
        learner.step(indices[0])  # makes the optimizer's state
        kernels.clear()
        with _Operators() as operators:
            if how == "trainer":
                learner.steps(indices, [0.1] * STEPS)
            else:
                learner.step(indices[0])
    return (len(kernels) + operators.count) / (STEPS if how == "trainer" else 1)


def lenet_rows(batch: int) -> Iterator[str]:
    """The lines of LeNet's table."""
    for pruned in ROUNDS:
        model = lenet(pruned)
        fits = programs.fits([model], Recipe(device="cpu", batch_size=batch))
        for how in ("masked", "csr", *(("trainer",) if fits else ())):
            moved = lenet_bytes(model, how, batch)
            launches = f"{lenet_launches(model, how, batch, 2):g}"
            cells = [f"{n * moved / 1e6:.1f} | {1e6 * n * moved / BANDWIDTH:.2f}" for n in TICKETS]
            yield f"| {lth.density(model):.1%} | {how} | {launches} | {' | '.join(cells)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lenet", action="store_true")
    options = parser.parse_args()
    return _print_lenet(options) if options.lenet else _print_layers(options)


def _print_lenet(options) -> int:
    of = " | ".join(f"MB, {n} ticket{'s' * (n > 1)} | us" for n in TICKETS)
    sys.stdout.write(f"batch {options.batch}, {BANDWIDTH / 1e12} TB/s\n\n| weights | strategy | launches | {of} |\n")
    sys.stdout.write("|---:|---|---:" + "|---:" * 2 * len(TICKETS) + "|\n")
    for line in lenet_rows(options.batch):
        sys.stdout.write(line + "\n")
    return 0


def _print_layers(options) -> int:
    machine = costs.machine(torch.device(options.device), torch.float32, torch.get_num_threads())
    limits = f"{machine.bandwidth / 1e9:.1f} GB/s, {machine.rate / 1e12:.2f} TFLOP/s"
    sys.stdout.write(f"batch {options.batch}, limits {limits}\n")
    head = "| sparsity | strategy | resident MB | of dense | moved MB | GFLOP | limit ms |"
    for name, layer in layers(options.batch).items():
        sys.stdout.write(f"\n## {name}\n\n{head}\n|---:|---|---:|---:|---:|---:|---:|\n")
        for line in rows(name, layer, machine):
            sys.stdout.write(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
