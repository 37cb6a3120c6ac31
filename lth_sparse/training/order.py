"""Which images each step takes."""

import torch
from torch import Tensor


class Order:
    """Batch i is the images at places i*B to (i+1)*B of an endless row of seeded permutations, one per epoch.

    A function of the iteration alone, so nothing of it needs saving, and no image is left out of an epoch.
    """

    def __init__(self, size: int, batch_size: int, seed: int, device: str):
        self.size, self.batch_size, self.seed, self.device = size, batch_size, seed, device
        self.epochs: dict[int, Tensor] = {}

    def batches(self, iteration: int, count: int = 1) -> Tensor:
        """Indices int64 [count, batch_size] of the images of `count` iterations, the first of them `iteration`."""
        first, last = iteration * self.batch_size, (iteration + count) * self.batch_size
        parts = []
        while first < last:
            epoch, place = divmod(first, self.size)
            part = self._epoch(epoch)[place : place + last - first]
            parts.append(part)
            first += len(part)
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(count, self.batch_size)

    def _epoch(self, epoch):
        if epoch not in self.epochs:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            order = torch.randperm(self.size, generator=generator).to(self.device)
            self.epochs = {e: o for e, o in self.epochs.items() if e == epoch - 1} | {epoch: order}
        return self.epochs[epoch]
