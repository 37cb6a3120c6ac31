"""Every strategy that can run here against the masked state: whole training steps of single layers.

    python benchmarks/strategies.py [--device cuda] [--precision highest high] [--dtype float32] [--batches 60 512 4096]
        [--linear 4096x4096 ...] [--conv 64x64x3x32 ...] [--sparsities 0.5 0.8 ...] [--rounds 21]

A step is forward, all three gradients, fused Adam, and the refresh of the shadow where there is one; data and masks are
random. Each cell is masked time / strategy time, the median over rounds in which all of a row take turns. A convolution
is Cin x Cout x kernel x image side, padded to keep its size.
"""

import argparse
import sys

import torch

from lth_sparse import dispatch
from lth_sparse.ops import STRATEGIES

SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.98, 0.99)


def make_layer(kind: str, sizes: list[int], batch: int, sparsity: float, options) -> dispatch.Layer:
    """A layer with random masks, as `dispatch` measures it."""
    generator = torch.Generator().manual_seed(0)
    if kind == "linear":
        n, k = sizes
        shape, layer_sizes, inputs = (1, n, k), (n,), (batch, k)
    else:
        cin, cout, kernel, side = sizes
        shape, inputs = (1, cout, kernel, kernel, cin), (batch, cin, side, side)
        layer_sizes = (cout, kernel, kernel, 1, 1, kernel // 2, kernel // 2, 1, 1, 1)
    masks = (torch.rand(shape, generator=generator) >= sparsity).to(options.device)
    return dispatch.Layer(kind, masks, layer_sizes, getattr(torch, options.dtype), inputs)


def table(kind: str, text: str, batch: int, options):
    """The lines of one layer's table."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    names = [name for name in dispatch.runnable(device, dtype, kind) if name != "masked"]
    yield f"\n{kind} {text}, batch {batch}\n"
    yield "| sparsity | " + " | ".join(names) + " |"
    yield "|---:|" + "---:|" * len(names)
    for sparsity in options.sparsities:
        layer = make_layer(kind, [int(size) for size in text.split("x")], batch, sparsity, options)
        gains = dispatch.measured_gains(layer, names, options.rounds)
        yield f"| {sparsity:.0%} | " + " | ".join(f"{gains[name]:.2f}" for name in names) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--precision", nargs="+", default=["highest"], choices=["highest", "high"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--batches", type=int, nargs="+", default=[60])
    parser.add_argument("--linear", nargs="*", default=["1024x1024", "4096x4096"])
    parser.add_argument("--conv", nargs="*", default=["64x64x3x32", "256x256x3x8"])
    parser.add_argument("--sparsities", type=float, nargs="+", default=SPARSITIES)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{torch.get_num_threads()} threads"
    sys.stdout.write(f"{name}, torch {torch.__version__}, {options.dtype}, n = {options.rounds} rounds\n")
    for precision in options.precision:
        torch.set_float32_matmul_precision(precision)
        sys.stdout.write(f"\nfloat32 products: {precision}\n")
        for kind, texts in zip(STRATEGIES, (options.linear, options.conv), strict=True):
            for text in texts if len(dispatch.runnable(torch.device(options.device), torch.float32, kind)) > 1 else ():
                for batch in options.batches:
                    for line in table(kind, text, batch, options):
                        sys.stdout.write(line + "\n")
                        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
