"""Index structures of a mask: where the kept weights lie."""

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
