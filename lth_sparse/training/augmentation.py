"""Random crops and flips of small images, on the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

MARGIN = 4  # pixels of padding on each side that a crop may reach into, as usual for CIFAR-10 (He et al. 2016, 4.2)


def draw_moves(count: int, seed: int) -> Tensor:
    """For `count` images: rows and columns that the crop starts at, and whether to flip; int64 [count, 3]."""
    generator = torch.Generator().manual_seed(seed)
    limits = torch.tensor([2 * MARGIN + 1, 2 * MARGIN + 1, 2])
    return (torch.rand(count, 3, generator=generator, dtype=torch.float64) * limits).long()


def augmented(images: Tensor, moves: Tensor) -> Tensor:
    """Images [B, C, H, W], padded with zeros, cropped to their size at `moves` [B, 3], then flipped left to right."""
    batch, _, high, wide = images.shape
    down, right, flip = moves.unbind(1)
    columns = torch.arange(wide, device=images.device).expand(batch, wide)
    columns = torch.where(flip[:, None] > 0, wide - 1 - columns, columns) + right[:, None]
    rows = torch.arange(high, device=images.device) + down[:, None]
    ticket = torch.arange(batch, device=images.device)[:, None, None]
    padded = F.pad(images, (MARGIN,) * 4).permute(0, 2, 3, 1)
    return padded[ticket, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
