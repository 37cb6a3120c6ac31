"""Operators with a mask in them; the only package that imports the kernels."""

from ..kernels.pattern import Bitmap, pack_bits, unpack_bits
from . import trainer
from .conv import conv_options, conv_sizes, output_shape, pads_first
from .masked import Masked, apply_mask, mask_gradient, masked_linear
from .nodes import cross_entropy, gather, tally
from .packed import STRATEGIES, packed, refresh_
from .strategy import check_input

__all__ = [
    "STRATEGIES",
    "Bitmap",
    "Masked",
    "apply_mask",
    "check_input",
    "conv_options",
    "conv_sizes",
    "cross_entropy",
    "gather",
    "mask_gradient",
    "masked_linear",
    "output_shape",
    "pack_bits",
    "packed",
    "pads_first",
    "refresh_",
    "tally",
    "trainer",
    "unpack_bits",
]
