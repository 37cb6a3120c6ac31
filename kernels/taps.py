"""Kept weights of a 2-D convolution, listed by the plane they add to, for a kernel that visits them alone."""

from typing import NamedTuple

import torch
from torch import Tensor

from .geometry import Geometry
from .pattern import kept_weights


class Reads(NamedTuple):
    """What each output plane sums: kept weights times shifted input planes; int32.

    `starts` [planes + 1] into `places` [nnz], which hold channel * 65536 + rows down * 256 + columns right of what a
    weight reads, ascending within a plane so that planes summed side by side read the same channel at about the same
    time; `order` [nnz], each weight's place in the packed values; `by_length` [planes], most weights first. Where the
    values of a plane lie together, `order` counts from its start, in uint16 if that suffices: at half of the weights
    kept, both lists and Adam's state then take less memory than the dense layer (15.4 bytes a weight, not 16.4).
    """

    starts: Tensor
    places: Tensor
    order: Tensor
    by_length: Tensor


class Taps(NamedTuple):
    """The kept weights of one convolution, by output channel and, for the input gradient, by phase and input channel.

    A stride of s leaves s phases of input rows, each reached by other taps: row r of the input, in phase r % s, is a
    convolution of stride 1 over the output gradient. So no tap is visited for a pixel that it does not reach. The plane
    of a channel in phase (i, j) is number (i * stride[1] + j) * Cin + channel.
    """

    geometry: Geometry
    forward: Reads
    gradient: Reads


def taps(mask: Tensor, geometry: Geometry) -> Taps:
    """The `Taps` of a bool mask [Cout, Cin / groups, kh, kw], whose packed values lie in order (Cout, kh, kw, Cin).

    Raises:
        ValueError: a mask that is not 4-D or keeps 2**31 weights or more, does not fit the geometry, or reaches past
            32,767 channels or 255 pixels.
    """
    _check(mask, geometry)
    cout, *tap, cin = mask.permute(0, 2, 3, 1).nonzero().unbind(1)
    cin = cin + cout // (mask.shape[0] // geometry.groups) * mask.shape[1]
    shifts = [at * apart for at, apart in zip(tap, geometry.dilation, strict=True)]
    forward = _relative(_reads(cout, cin, *shifts, mask.shape[0]), mask[0].numel())
    below = [shift - pad for shift, pad in zip(shifts, geometry.padding, strict=True)]
    phase, phase_right = [at % step for at, step in zip(below, geometry.stride, strict=True)]
    back = [b - at // step for b, at, step in zip(furthest(geometry), below, geometry.stride, strict=True)]
    channels = mask.shape[1] * geometry.groups
    plane = (phase * geometry.stride[1] + phase_right) * channels + cin
    return Taps(geometry, forward, _reads(plane, cout, *back, channels * geometry.stride[0] * geometry.stride[1]))


def furthest(geometry: Geometry) -> list[int]:
    """How many rows and columns before its own an input pixel, counted within its phase, is reached from."""
    sizes = zip(geometry.kernel, geometry.stride, geometry.padding, geometry.dilation, strict=True)
    return [((kernel - 1) * apart - pad) // step for kernel, step, pad, apart in sizes]


def _reads(plane, channel, down, right, planes):
    place = (channel << 16) | (down << 8) | right
    order = torch.argsort((plane << 32) | place)
    counts = torch.bincount(plane, minlength=planes)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    by_length = counts.argsort(descending=True, stable=True)
    return Reads(starts.int(), place[order].int(), order.int(), by_length.int())


def _relative(reads, longest):
    order = reads.order - reads.starts[:-1].repeat_interleave(reads.starts.diff())
    return reads._replace(order=order.to(torch.uint16) if longest <= 2**16 else order)


def _check(mask, geometry):
    if mask.dim() != 4 or mask.dtype != torch.bool or mask.shape[2:] != geometry.kernel:
        raise ValueError(
            f"a mask of kernels {tuple(geometry.kernel)} is bool [Cout, Cin / groups, kh, kw], got {mask.dtype} "
            f"{tuple(mask.shape)}"
        )
    if mask.shape[0] % geometry.groups:
        raise ValueError(f"{mask.shape[0]} output channels do not fall into {geometry.groups} groups")
    kept_weights(mask[None])
    reach = [(kernel - 1) * apart for kernel, apart in zip(geometry.kernel, geometry.dilation, strict=True)]
    channels = max(mask.shape[0], mask.shape[1] * geometry.groups)
    if channels >= 2**15 or max(reach) >= 2**8:
        raise ValueError(
            f"a direct convolution takes at most 32,767 channels and windows of at most 256 pixels, got {channels} "
            f"channels and windows of {tuple(pixels + 1 for pixels in reach)}"
        )
