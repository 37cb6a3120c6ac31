"""Operators with a mask in them; the only package that imports the kernels."""

from ..kernels.pattern import Bitmap, bitmap, pack_bits, unpack_bits
from .conv import conv_options, conv_sizes, output_shape, pads_first
from .masked import apply_mask, mask_gradient, masked_linear
from .packed import STRATEGIES, packed, refresh_
from .strategy import Strategy, check_input, kernels

__all__ = [
    "STRATEGIES",
    "Bitmap",
    "Strategy",
    "apply_mask",
    "bitmap",
    "check_input",
    "conv_options",
    "conv_sizes",
    "kernels",
    "mask_gradient",
    "masked_linear",
    "output_shape",
    "pack_bits",
    "packed",
    "pads_first",
    "refresh_",
    "unpack_bits",
]
