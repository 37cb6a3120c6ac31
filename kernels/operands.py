"""What the launchers of matrix kernels take, and the checks that they share."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = ", ".join(str(dtype)[6:] for dtype in DTYPES)
PRECISIONS = ("ieee", "tf32", "tf32x3")  # of float32 products


def check_precision(precision: str) -> None:
    """ValueError unless `precision` is one of PRECISIONS."""
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")


def beside(name: str, tensor: Tensor | None, shape: tuple[int, ...], x: Tensor) -> Tensor | None:
    """`tensor`, contiguous, if it is `shape` of float32 or the dtype of x, on the device of x; None is left out.

    Raises:
        ValueError: it is not.
    """
    if tensor is None:
        return None
    if tensor.shape != shape or tensor.dtype not in (torch.float32, x.dtype) or tensor.device != x.device:
        got = f"{tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
        raise ValueError(f"{name} must be {shape} of float32 or {x.dtype} on {x.device}, got {got}")
    return tensor.contiguous()
