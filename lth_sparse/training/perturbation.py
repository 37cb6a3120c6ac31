"""Noise on the weights that would be pruned next, in place of pruning them (lecode, idea 2)."""

import torch
from torch import nn

from ..masks import masked_weights, sync_
from ..prune import lowest


@torch.no_grad()
def perturb_(model: nn.Module, rate: float, scale: float, seed: int) -> nn.Module:
    """Add Gaussian noise to the fraction `rate` of each layer's kept weights of least magnitude; return the model.

    Its standard deviation is `scale` times that of the layer's kept weights. Drawn on the CPU, so that the same seed
    means the same noise on every device.
    """
    generator = torch.Generator().manual_seed(seed)
    for weight in masked_weights(model):
        values, kept = weight.parameter, weight.mask
        least = lowest(values.abs().flatten(), kept.flatten(), round(rate * int(kept.count_nonzero())), generator)
        noise = torch.randn(values.shape, generator=generator).to(values) * values[kept].std(correction=0)
        values.add_(scale * noise * least.view_as(kept))
    return sync_(model)
