"""Bytes resident and moved, and flops, of a training step with Adam, by strategy and sparsity, and the machine's limit.

    python benchmarks/costs.py [--batch 60] [--device cpu]

Counted from the index structures of random masks (`lth_sparse.costs`), not measured. Percentages are of the dense
layer: weight, gradient and two moments in float32. The limit is the larger of bytes over the bandwidth and flops over
the rate of float32 products that torch reaches on this machine.
"""

import argparse
import sys

import torch

from lth_sparse import costs
from lth_sparse.dispatch import Layer
from lth_sparse.ops import STRATEGIES

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def layers(batch: int) -> dict[str, Layer]:
    """A Linear and a convolution, with full masks."""
    conv = (256, 3, 3, 1, 1, 1, 1, 1, 1, 1)
    linear_masks, conv_masks = (torch.ones(shape, dtype=torch.bool) for shape in ((1, 4096, 4096), (1, 256, 3, 3, 256)))
    return {
        "Linear 4096 x 4096": Layer("linear", linear_masks, (4096,), torch.float32, (batch, 4096)),
        "Conv2d 256 x 256 x 3 x 3 on 8 x 8": Layer("conv2d", conv_masks, conv, torch.float32, (batch, 256, 8, 8)),
    }


def rows(name: str, layer: Layer, machine: costs.Machine):
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=60)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
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
