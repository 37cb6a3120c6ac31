"""Small masked models, and a training that checks after every step that nothing off the masks is alive."""

import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.masks import masked_weights


def pruned(model, rate=0.5):
    return lth.prune_(lth.sparsify_(model), rate)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))


def images(*shape):
    return torch.randn(*(shape or (5, 1, 4, 4)), generator=torch.Generator().manual_seed(1))


def assert_clean(model):
    for weight in masked_weights(model):
        assert not weight.mask.all() and weight.mask.any()
        gradient = weight.parameter.grad
        assert (weight.parameter[~weight.mask] == 0).all() and (gradient is None or (gradient[~weight.mask] == 0).all())


def train(model, *inputs, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        output = model(*inputs)
        (output[0] if isinstance(output, tuple) else output).float().square().mean().backward()
        optimizer.step()
        assert_clean(model)
    return model
