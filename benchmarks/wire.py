"""Bytes that two processes send each other in a training step under DistributedDataParallel, masked and packed.

    python benchmarks/wire.py [--densities 1 0.5 0.2 0.1 0.05 0.02]

Two gloo processes on this machine (Linux), random data and masks; a step is forward and backward, as optimizers send
nothing. Counted is what each process hands to the collectives: gradients to sum and buffers to broadcast. Measured is
what Linux says that the TCP sockets of both received: summing sends the gradients in both directions, broadcasting the
buffers in one. On a CPU `pack_` would leave most of these layers masked; it is told to pack them all, convolutions by a
strategy that runs in Triton's interpreter there: no place to look for times.
"""

import argparse
import os
import socket
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import lth_sparse as lth

DENSITIES = (1.0, 0.5, 0.2, 0.1, 0.05, 0.02)
INPUTS, BATCH = 1024, 4
STRATEGIES = {nn.Linear: "cpu", nn.Conv2d: "dense"}
WARM_UP = 3  # steps; before the second, DDP sends the order of its buckets, once
RECEIVED = 128  # where Linux's `struct tcp_info` has tcpi_bytes_received, 8 bytes


class Traffic(NamedTuple):
    """Bytes: in a step, handed over by each process and received by both; and received while DDP was constructed."""

    gradients: int
    buffers: int
    received: int
    construction: int


def perceptron() -> nn.Sequential:
    layers = [module for _ in range(4) for module in (nn.Linear(INPUTS, INPUTS), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional() -> nn.Sequential:
    sizes = (16, 64), (64, 128)
    layers = [module for a, b in sizes for module in (nn.Conv2d(a, b, 3), nn.BatchNorm2d(b), nn.ReLU())]
    return nn.Sequential(nn.Unflatten(1, (16, 8, 8)), *layers, nn.Flatten(), nn.Linear(2048, 16))


NETWORKS = {"Four Linear layers of 1024 x 1024": perceptron, "Convolutions and batch normalisation": convolutional}


def network(build: Callable[[], nn.Module], state: str, density: float) -> nn.Module:
    """A network that is dense, masked or packed; the same in every process."""
    torch.manual_seed(0)
    model = build()
    if state == "dense":
        return model
    strategies = {name: STRATEGIES[type(layer)] for name, layer in model.named_modules() if type(layer) in STRATEGIES}
    lth.sparsify_(model)
    if density < 1:
        lth.prune_(model, 1 - density, score="random")
    return lth.pack_(model, strategies=strategies) if state == "packed" else model


def received() -> int:
    """Bytes that this process has received so far through the TCP sockets that it has open."""
    total = 0
    for descriptor in map(int, os.listdir("/proc/self/fd")):
        try:
            connection = socket.socket(fileno=descriptor)
        except OSError:  # a file
            continue
        if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.type == socket.SOCK_STREAM:
            info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, RECEIVED + 8)
            total += struct.unpack_from("Q", info, RECEIVED)[0]
        connection.detach()  # leaves it open
    return total


def received_by_all() -> int:
    """The sum of `received` over the processes, which wait for one another; asking adds 0.6 kB to it."""
    dist.barrier()
    total = torch.tensor(received())
    dist.all_reduce(total)
    return int(total)


def traffic(model: nn.Module) -> Traffic:
    """What a step of `model` sends; to be called in every process with the same model."""
    before, gradients, buffers = received_by_all(), [], []
    parallel, broadcast = DistributedDataParallel(model), dist._broadcast_coalesced
    construction = received_by_all() - before

    def reduce(gradients, bucket):
        gradients.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    def count(group, tensors, *rest):
        buffers.extend(tensor.nbytes for tensor in tensors)
        return broadcast(group, tensors, *rest)

    parallel.register_comm_hook(gradients, reduce)
    with patch.object(dist, "_broadcast_coalesced", count):
        for _ in range(WARM_UP + 1):
            gradients.clear()
            buffers.clear()
            before = received_by_all()
            parallel(torch.randn(BATCH, INPUTS)).square().mean().backward()
    return Traffic(sum(gradients), sum(buffers), received_by_all() - before, construction)


def rows(build: Callable[[], nn.Module], densities: list[float]) -> Iterator[str]:
    """The lines of a network's table."""
    dense = None
    for state, density in [("dense", 1.0), *((state, d) for state in ("masked", "packed") for d in densities)]:
        found = traffic(network(build, state, density))
        dense = dense or found
        kilobytes = " | ".join(f"{n / 1000:,.1f}" for n in found)
        yield f"| {density:.0%} | {state} | {kilobytes} | {found.received / dense.received:.1%} |"


def process(rank: int, store: str, densities: list[float]) -> None:
    """One of the two processes; the first prints."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    head = "| weights | state | gradients kB | buffers kB | received kB | at construction kB | received, of dense |"
    for name, build in NETWORKS.items():
        for line in (f"\n## {name}\n\n{head}\n|---:|---|---:|---:|---:|---:|---:|", *rows(build, densities)):
            if rank == 0:
                sys.stdout.write(line + "\n")
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # threads of gloo that outlive the interpreter abort the process at its end, one time in some forty


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--densities", type=float, nargs="+", default=DENSITIES)
    options = parser.parse_args()
    os.environ["TRITON_INTERPRET"] = "1"
    sys.stdout.write(f"batch {BATCH}, float32, 2 processes, gloo, torch {torch.__version__}\n")
    sys.stdout.flush()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(process, (os.path.join(folder, "store"), options.densities), nprocs=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
