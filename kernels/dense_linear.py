"""R linear layers at once with dense weights, and their input gradients: one launch each, however few the tickets.

Weights are zero where they are pruned, so neither product needs a mask; bias, ReLU and its gate are epilogues. Small
layers do not fill a GPU: tiles shrink until there is a program for every multiprocessor, or none is smaller.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import DTYPES, NAMES, beside, check_precision

PROGRAMS = 132  # one for each multiprocessor of an H200
# Outputs and samples of a tile: the first that fits the product and fills the GPU. 64 outputs are the fewest of wgmma.
TILES = ((64, 128), (64, 64), (64, 32), (32, 32), (16, 16))


@triton.jit
def _dense_linear_kernel(
    x, weight, bias, gate, y,
    batch, depth, width, x_ticket,
    TRANSPOSED: tl.constexpr, RELU: tl.constexpr, PRECISION: tl.constexpr, ALIGNED: tl.constexpr,
    OUT: tl.constexpr, BATCH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    depth = depth // ALIGNED * ALIGNED  # which it is: so the compiler knows that rows are whole vectors
    if TRANSPOSED:
        width = width // ALIGNED * ALIGNED
    ticket = tl.program_id(2).to(tl.int64)
    first, first_b = tl.program_id(0) * OUT, tl.program_id(1) * BATCH
    o, b, k = first + tl.arange(0, OUT), tl.arange(0, BATCH), tl.arange(0, STEP)
    left = batch - first_b
    x += ticket * x_ticket + first_b.to(tl.int64) * depth
    if TRANSPOSED:
        weight += ticket * depth * width + first
        at = k[None, :] * width + tl.arange(0, OUT)[:, None]
    else:
        weight += (ticket * width + first) * depth
        at = tl.arange(0, OUT)[:, None] * depth + k[None, :]
    sums = tl.zeros((OUT, BATCH), tl.float32)
    for start in range(0, depth, STEP):
        inside = k < depth - start
        x_tile = tl.load(x + (b[None, :] * depth + k[:, None]), mask=inside[:, None] & (b < left)[None, :], other=0.0)
        tile = tl.load(weight + at, mask=(o < width)[:, None] & inside[None, :], other=0.0)
        if TRANSPOSED and PRECISION == "tf32":
            tile += 0.0  # keeps it in registers: wgmma would have it copied in columns, 4 bytes at a time
        x += STEP
        weight += STEP * width if TRANSPOSED else STEP
        sums = tl.dot(tile.to(x_tile.dtype), x_tile, sums, input_precision=PRECISION)
    if bias is not None:
        sums += tl.load(bias + ticket * width + o, mask=o < width, other=0.0).to(tl.float32)[:, None]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)  # NaN stays
    at = (ticket * batch + first_b) * width + (b[None, :] * width + o[:, None])
    inside = (o < width)[:, None] & (b < left)[None, :]
    if gate is not None:
        sums = tl.where(tl.load(gate + at, mask=inside, other=0.0) <= 0, 0.0, sums)
    tl.store(y + at, sums.to(y.dtype.element_ty), mask=inside)


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, relu: bool = False, precision: str = "ieee"
) -> Tensor:
    """y = x W^T + bias of R linear layers at once, then ReLU if asked for.

    Args:
        x: input [R, B, K], float32, bfloat16 or float16; R may be a stride-0 expansion. What is not contiguous is
            copied.
        weight: [R, N, K], N and K below 2**24, float32 or of the dtype of x, to which it is rounded.
        bias: [R, N], float32 or of the dtype of x, or None.
        precision: of the float32 product: "ieee", "tf32" or "tf32x3"; sums are float32 always.

    Returns:
        y [R, B, N] in the dtype of x. Deterministic: each entry is summed by one program.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    weight = _weight("x", x, weight, precision, depth=2)
    bias = beside("bias", bias, tuple(weight.shape[:2]), x)
    return _product(x, weight, bias, None, relu, precision, transposed=False)


def input_gradient(dy: Tensor, weight: Tensor, gate: Tensor | None = None, precision: str = "ieee") -> Tensor:
    """dx = dy W of R linear layers at once, and zero where `gate` is not positive.

    Args:
        dy: output gradient [R, B, N]; as x in `forward`, as are weight and precision.
        gate: output [R, B, K] of the ReLU that made x, float32 or of the dtype of dy, or None.

    Returns:
        dx [R, B, K] in the dtype of dy, deterministic.

    Raises:
        ValueError: as `forward`.
    """
    weight = _weight("dy", dy, weight, precision, depth=1)
    gate = beside("gate", gate, (*dy.shape[:2], weight.shape[2]), dy)
    return _product(dy, weight, None, gate, False, precision, transposed=True)


def _product(x, weight, bias, gate, relu, precision, transposed):
    tickets, batch, depth = x.shape
    width = weight.shape[2 if transposed else 1]
    y = torch.empty(tickets, batch, width, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    x = (x[:1] if x.stride(0) == 0 else x).contiguous()
    out, tile = _tile(tickets, batch, width)
    _dense_linear_kernel[triton.cdiv(width, out), triton.cdiv(batch, tile), tickets](
        x, weight, bias, gate, y,
        batch, depth, width, batch * depth if len(x) > 1 else 0,
        TRANSPOSED=transposed, RELU=relu, PRECISION=precision,
        ALIGNED=math.gcd(depth, weight.shape[2], 16 // x.element_size()),
        OUT=out, BATCH=tile, STEP=_step(out, x.dtype, precision),
        num_warps=8 if out * tile >= 64 * 64 else 4, num_stages=4,
    )  # fmt: skip
    return y


def _tile(tickets: int, batch: int, width: int) -> tuple[int, int]:
    """The entry of `TILES` for a product; the last if none makes enough programs."""
    for out, tile in TILES:
        fits = out < 2 * max(width, 16) and tile < 2 * max(batch, 16)
        if fits and triton.cdiv(width, out) * triton.cdiv(batch, tile) * tickets >= PROGRAMS:
            break
    return out, tile


def _step(out: int, dtype: torch.dtype, precision: str) -> int:
    """Of the sum per step: 128 bytes a row, and more of them where a tile is small, as each step is a trip to memory.

    Full float32, or three passes of tf32, take most of their operands into registers, and would spill them.
    """
    if dtype == torch.float32 and precision != "tf32":
        return 1024 // out
    return max(128 // dtype.itemsize, 2048 // out)


def _weight(name, x, weight, precision, depth):
    """`weight`, contiguous, if x and it fit together: the sum is along dimension `depth` of it."""
    wanted = f"[R, B, {'?NK'[depth]}] and [R, N, K]"
    if not (x.dim() == weight.dim() == 3 and x.shape[0] == weight.shape[0] and x.shape[2] == weight.shape[depth]):
        raise ValueError(f"{name} and weight must be {wanted}, got {tuple(x.shape)} and {tuple(weight.shape)}")
    if x.dtype not in DTYPES:
        raise ValueError(f"{name} must be of {NAMES}, got {x.dtype}")
    check_precision(precision)
    return beside("weight", weight, tuple(weight.shape), x)
