"""Who computes: what a user would otherwise pick, and each of our strategies. All train with Adam, the default of each.

A provider is a function `(model, masks, x) -> Contestant` that makes a dense model its own, with the given masks: bool
tensors by the name of a layer, "" if the model is that layer. `x` is a batch as the model will get it.
"""

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import lth_sparse as lth
from lth_sparse import dispatch, ops

PARTS = ("forward", "input gradient", "weight gradient", "optimizer", "step")
TUNED = ("dense, fused Adam", "dense, compiled")  # of these the faster one is what "dense tuned" means
PRUNE = "torch.nn.utils.prune"
CHOSEN = "ours: chosen"


class Contestant(NamedTuple):
    """A model with its optimizer, which `lacks` may say why it has none; `mask` is that of a layer, None if dense."""

    model: nn.Module
    optimizer: torch.optim.Optimizer | None
    mask: Tensor | None
    note: str = ""
    parts: tuple[str, ...] = PARTS
    lacks: str = ""


class Unable(Exception):
    """Says in a sentence why a provider cannot do what it is asked."""


def dense(model, masks, x):
    return Contestant(model, torch.optim.Adam(model.parameters()), None)


def fused(model, masks, x):
    return Contestant(model, torch.optim.Adam(model.parameters(), fused=True), None)


def compiled(model, masks, x):
    torch._dynamo.reset()  # or the ninth shape of one layer type silently stays eager
    if x.dim() == 4:
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    lacks = "torch.compile computes all gradients as one"
    return Contestant(torch.compile(model), optimizer, None, "", ("forward", "optimizer", "step"), lacks)


def by_hand(model, masks, x):
    """Pruned weights are set back to zero after every step."""
    pairs = [(model.get_submodule(name).weight, mask) for name, mask in masks.items()]

    @torch.no_grad()
    def mask_again(*_):
        for weight, mask in pairs:
            weight.mul_(mask)

    mask_again()
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    optimizer.register_step_post_hook(mask_again)
    return Contestant(model, optimizer, masks.get(""))


def pruned(model, masks, x):
    for name, mask in masks.items():
        prune.custom_from_mask(model.get_submodule(name), "weight", mask)
    return Contestant(model, torch.optim.Adam(model.parameters()), masks.get(""))


class _Csr(nn.Module):
    """A Linear with a CSR weight; its values are the parameter, as torch's optimizers do not take CSR tensors."""

    def __init__(self, layer: nn.Linear, mask: Tensor):
        super().__init__()
        sparse = (layer.weight.detach() * mask).to_sparse_csr()
        self.starts, self.columns, self.shape = sparse.crow_indices(), sparse.col_indices(), sparse.shape
        self.values, self.bias = nn.Parameter(sparse.values().clone()), layer.bias

    def forward(self, x: Tensor) -> Tensor:
        values = self.values.to(x.dtype)
        weight = torch.sparse_csr_tensor(self.starts, self.columns, values, self.shape, check_invariants=False)
        return (weight @ x.t()).t() + self.bias.to(x.dtype)


def csr(model, masks, x):
    model = _Csr(model, masks[""])
    return Contestant(model, torch.optim.Adam(model.parameters(), fused=True), masks[""])


class _Frozen(nn.Module):
    """A Linear with a sparse weight that torch can multiply with, but not train."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.weight, self.bias = weight, bias.detach().to(weight.dtype)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def blocks(model, masks, x, side=32):
    """BSR, with as many weights as the mask keeps, but in blocks: what structure would buy."""
    outputs, inputs = model.weight.shape
    if outputs % side or inputs % side:
        raise Unable(f"{outputs} x {inputs} is not made of blocks of {side} x {side}")
    density = masks[""].float().mean().item()
    kept = torch.rand(outputs // side, inputs // side, device=x.device) < density
    mask = kept.repeat_interleave(side, 0).repeat_interleave(side, 1)
    weight = (model.weight.detach() * mask).to(x.dtype).to_sparse_bsr((side, side))
    return _forward_only(weight, model, mask, f"blocks of {side} x {side}")


def two_of_four(model, masks, x):
    """2:4 semi-structured sparsity, where the mask keeps about half."""
    density = masks[""].float().mean().item()
    if not 0.45 < density < 0.55 or x.dtype == torch.float32:
        raise Unable("2:4 keeps half of the weights, in half precision")
    mask = torch.rand(model.weight.shape, device=x.device).unflatten(1, (-1, 4)).argsort(-1).flatten(1) < 2
    weight = torch.sparse.to_sparse_semi_structured((model.weight.detach() * mask).to(x.dtype))
    return _forward_only(weight, model, mask, "2 of 4 weights")


def _forward_only(weight, model, mask, note):
    lacks = "torch does not train a weight of this layout"
    return Contestant(_Frozen(weight, model.bias), None, mask, note, ("forward",), lacks)


def masked(model, masks, x):
    """Our masked state, before `pack_`."""
    others = [name for name, layer in model.named_modules() if _is_layer(layer) and name not in masks]
    lth.sparsify_(model, exclude=others)
    for name, mask in masks.items():
        model.get_submodule(name).weight_mask.copy_(mask)
    return Contestant(lth.sync_(model), lth.optim.Adam(model.parameters()), masks.get(""))


def forced(strategy: str, model, masks, x):
    """One of our strategies, by the variable that users force it with."""
    found = masked(model, masks, x)
    with patch.dict(os.environ, LTH_STRATEGY=strategy):
        return _packed(found, x, {strategy})


def chosen(model, masks, x):
    """What `pack_` picks by measuring; the note names it."""
    return _packed(masked(model, masks, x), x, set(dispatch.NAMES))


def _packed(found, x, wanted):
    model = lth.pack_(found.model, x.detach().float())
    taken = [line.strategy for line in lth.summary(model) if line.strategy]
    if not wanted.issuperset(taken):
        raise Unable(f"the layer is computed by {', '.join(taken)} instead")
    return found._replace(optimizer=lth.optim.Adam(model.parameters()), note="/".join(taken))


def _is_layer(module):
    return isinstance(module, (nn.Linear, nn.Conv2d))


DENSE: dict[str, Callable] = {"dense, Adam": dense, "dense, fused Adam": fused, "dense, compiled": compiled}
SPARSE: dict[str, Callable] = {
    "dense, masked by hand": by_hand,
    PRUNE: pruned,
    "ours: masked": masked,
    CHOSEN: chosen,
}
OF_LINEAR: dict[str, Callable] = {"torch CSR": csr, "torch BSR": blocks, "torch 2:4": two_of_four}


def sparse(kind: str) -> dict[str, Callable]:
    """All that take a mask, for a layer of that kind: every strategy of ours too."""
    strategies = [*(["fused"] if kind == "linear" else []), *ops.STRATEGIES[kind]]
    ours = {f"ours: {strategy}": partial(forced, strategy) for strategy in strategies}
    return {**SPARSE, **(OF_LINEAR if kind == "linear" else {}), **ours}


def absent(kind: str | None, device: torch.device) -> dict[str, tuple[str, str]]:
    """Status and reason of those who can do nothing on a device; `kind` is None for networks."""
    found = {} if device.type == "cuda" else dict.fromkeys(["dense, compiled"], ("no GPU", "it is tuned on CUDA alone"))
    if kind is None:
        return found
    if device.type != "cuda" and kind == "linear":
        found["torch 2:4"] = ("no GPU", "torch has no such product on the CPU")
    able = dispatch.runnable(device, torch.float32, kind)
    for name, provider in sparse(kind).items():
        if isinstance(provider, partial) and provider.args[0] not in able:
            on_cpu = provider.args[0] == "cpu"
            found[name] = ("not runnable", "it is for the CPU") if on_cpu else ("no GPU", "its kernels run on CUDA")
    return found
