"""Index structures of a mask: where the kept weights lie."""

from typing import NamedTuple

import torch
from torch import Tensor


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a bool mask into uint8 [ceil(numel / 8)], row-major, first weight in the lowest bit."""
    bits = torch.nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8))
    shifts = torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (bits.view(-1, 8) << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Undo `pack_bits`: bool mask of `shape`, on the device of `bits`.

    Raises:
        ValueError: `bits` is not uint8 of ceil(numel / 8) entries.
    """
    numel = int(torch.Size(shape).numel())
    if bits.dtype != torch.uint8 or bits.shape != (-(-numel // 8),):
        raise ValueError(
            f"a mask of shape {tuple(shape)} is {-(-numel // 8)} bytes of bits, got {bits.dtype} {tuple(bits.shape)}"
        )
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return ((bits[:, None] >> shifts) & 1).bool().flatten()[:numel].view(shape)


def kept_weights(masks: Tensor) -> int:
    """How many weights each of the bool `masks` [R, ...] keeps: as many as int32 can index, and all equally many.

    Raises:
        ValueError: tickets that keep different numbers of weights, or more than 2**31 - 1.
    """
    # one by one: a sum along dimensions copies a bool tensor to int64 first, 17 GB for 2**31 weights (torch 2.15)
    counts = [int(torch.count_nonzero(mask)) for mask in masks]
    if len(set(counts)) != 1 or counts[0] >= 2**31:
        raise ValueError(f"masks must keep equally many weights, fewer than 2**31, got {counts}")
    return counts[0]


class Bitmap(NamedTuple):
    """Masks [R, N, K] as 32-bit words, and where the values of each word begin.

    `words` int32 [R, N, ceil(K / 32)], bit k % 32 of word k // 32 set where column k is kept; `offsets` int32 of the
    same shape: kept weights of the ticket, in row-major order, before that word.
    """

    words: Tensor
    offsets: Tensor


def bitmap(masks: Tensor) -> Bitmap:
    """The `Bitmap` of bool `masks` [R, N, K].

    Raises:
        ValueError: tickets that keep different numbers of weights, or more than 2**31 - 1.
    """
    kept_weights(masks)
    bits = torch.nn.functional.pad(masks, (0, -masks.shape[2] % 32)).unflatten(2, (-1, 32))
    kept = bits.sum(-1)
    offsets = (kept.flatten(1).cumsum(1) - kept.flatten(1)).view_as(kept)
    words = (bits.int() << torch.arange(32, dtype=torch.int32, device=masks.device)).sum(-1, dtype=torch.int32)
    return Bitmap(words, offsets.int())
