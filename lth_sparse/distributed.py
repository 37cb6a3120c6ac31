"""One model in several processes: what they must agree on before `DistributedDataParallel` takes over."""

import tempfile
from pathlib import Path

import torch.distributed as dist
from torch import nn

from .checkpoint import load_, save
from .nn import MaskedLinear
from .packed import PackedLayer
from .packing import pack_, unpack_


def broadcast_(model: nn.Module, group: dist.ProcessGroup | None = None) -> nn.Module:
    """Make `model` in every process of `group` that of its rank 0: masks, all values, packed layers; return the model.

    To be called in all of them before `DistributedDataParallel` and the optimizer are made. Processes that pruned by
    other weights or seeds would share packed values that lie at different places, unnoticed; `pack_` may measure
    another strategy to be fastest in each; and shadows know nothing of values that torch copies. Rank 0 stays as it is,
    so it alone needs to prune and pack. Sent are kept values and a bit per masked weight.

    Raises:
        ValueError: rank 0 has no masked layer, or another process another model.
    """
    first = dist.get_rank(group) == 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ticket.safetensors")
        if first:
            save(model, path)
        ticket = [path.read_bytes(), _strategies(model)] if first else [None, None]
        dist.broadcast_object_list(ticket, group=group, group_src=0)
        if first:
            return model
        path.write_bytes(ticket[0])
        load_(unpack_(model), path)
    return pack_(model, strategies=ticket[1]) if ticket[1] else model


def _strategies(model) -> dict[str, str]:
    """The strategies of the layers of `model` that are packed or fused, by name."""
    fused = {name: "fused" for name, layer in model.named_modules() if isinstance(layer, MaskedLinear) and layer.fused}
    return fused | {name: layer.strategy for name, layer in model.named_modules() if isinstance(layer, PackedLayer)}
