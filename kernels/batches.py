"""Batches of R tickets, gathered from a data set on the device and scaled, in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .operands import DTYPES, NAMES

BLOCK = 1024  # pixels of a program: an image of MNIST, or a channel of CIFAR-10


@triton.jit
def _gather_kernel(images, indices, scale, shift, x, channels, pixels, BLOCK: tl.constexpr):
    sample, channel = tl.program_id(0).to(tl.int64), tl.program_id(1)
    pixel = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    image = tl.load(indices + sample)
    value = tl.load(images + (image * channels + channel) * pixels + pixel, mask=pixel < pixels, other=0)
    value = tl.fma(value.to(tl.float32), tl.load(scale + channel), tl.load(shift + channel))
    at = (sample * channels + channel) * pixels + pixel
    tl.store(x + at, value.to(x.dtype.element_ty), mask=pixel < pixels)


def gather(images: Tensor, indices: Tensor, scale: Tensor, shift: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """x[r, b] = images[indices[r, b]] * scale + shift, channel by channel, as one row.

    Args:
        images: [n, C, P] of P pixels a channel, contiguous, uint8 or float32.
        indices: int64 [R, B], from 0 to n - 1, which nothing checks.
        scale, shift: float32 [C].
        dtype: of x: float32, bfloat16 or float16.

    Returns:
        x [R, B, C * P]; computed in float32, rounded once for float32.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check(images, indices, scale, shift, dtype)
    (_, channels, pixels), (tickets, batch) = images.shape, indices.shape
    x = torch.empty(tickets, batch, channels * pixels, dtype=dtype, device=images.device)
    if x.numel():
        _gather_kernel[tickets * batch, channels, triton.cdiv(pixels, BLOCK)](
            images, indices.contiguous(), scale.contiguous(), shift.contiguous(), x, channels, pixels,
            BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
    return x


def _check(images, indices, scale, shift, dtype):
    if images.dim() != 3 or images.dtype not in (torch.uint8, torch.float32) or not images.is_contiguous():
        form = f"{'' if images.is_contiguous() else 'non-contiguous '}{images.dtype} {tuple(images.shape)}"
        raise ValueError(f"images must be uint8 or float32 [n, C, P], contiguous, got {form}")
    if indices.dim() != 2 or indices.dtype != torch.int64 or indices.device != images.device:
        form = f"{indices.dtype} {tuple(indices.shape)} on {indices.device}"
        raise ValueError(f"indices must be int64 [R, B] on {images.device}, got {form}")
    for name, tensor in (("scale", scale), ("shift", shift)):
        if tensor.shape != images.shape[1:2] or tensor.dtype != torch.float32 or tensor.device != images.device:
            form = f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be float32 ({images.shape[1]},) on {images.device}, got {form}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {NAMES}, got {dtype}")
