"""What each of two processes does with one model under DistributedDataParallel, over gloo.

A module of its own, as a process that is spawned imports it, and test modules have no name that it could.
"""

import os
import sys

import torch
import torch.distributed as dist
from lth_sparse.benchmarks import wire
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lth_sparse as lth

OPTIMIZERS = {
    "Adam of ours": lambda parameters: lth.optim.Adam(parameters, 0.01),
    "SGD of torch": lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
}
STEPS, BATCH = 2, 6
WIDTH, DENSITIES = 256, (1.0, 0.5, 0.1)


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4))


def pruned(seed=0):
    return lth.prune_(lth.sparsify_(network(seed)), 0.7)


def images(rank):
    return torch.randn(STEPS, BATCH, 1, 6, 6, generator=torch.Generator().manual_seed(rank))


def train(model, optimizer, batches):
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()


def outputs(model):
    """What decides the results: the state, and what the model computes, with its shadows."""
    found = model.state_dict() | {"outputs": model(images(2)[0])}
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def train_packed(rank, optimizer):
    """Two rounds: pruned and packed again between them, and wrapped again."""
    model, found = pruned(), []
    for _ in range(2):
        lth.pack_(model, strategies={"3": "cpu", "5": "cpu"})
        train(DistributedDataParallel(model), optimizer, images(rank))
        found.append(outputs(model))
        lth.prune_(lth.unpack_(model), 0.5)
    return found


def agree(rank):
    """The second process starts from another seed, prunes by its own weights, and does not pack."""
    model = pruned(rank)
    if rank == 0:
        lth.pack_(model, strategies={"0": "dense", "3": "cpu", "5": "fused"})  # the first has a shadow
    before = outputs(model)
    assert lth.broadcast_(model) is model
    found = {"before": before, "after": outputs(model)}
    train(DistributedDataParallel(model), "Adam of ours", images(rank))
    return found | {"trained": outputs(model), "states": [(row.state, row.strategy) for row in lth.summary(model)]}


def agree_masked(rank):
    """The second process has a plain model."""
    model = pruned() if rank == 0 else network(1)
    return outputs(lth.broadcast_(model)), type(model[0]).__name__


def wide():
    return nn.Sequential(nn.Linear(wire.INPUTS, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))


def traffic():
    """Bytes by state and density of two Linear layers."""
    cases = [("masked", 0.1), *(("packed", density) for density in DENSITIES)]
    return {case: tuple(wire.traffic(wire.network(wide, *case))) for case in cases}


def process(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    found = {name: train_packed(rank, name) for name in OPTIMIZERS}
    found |= {"agree": agree(rank), "agree masked": agree_masked(rank)}
    found |= {"traffic": traffic()} if sys.platform == "linux" else {}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()
    os._exit(0)  # threads of gloo that outlive the interpreter abort the process at its end, one time in some forty
