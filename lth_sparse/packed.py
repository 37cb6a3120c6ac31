"""Packed layers: a pruned weight does not exist. One parameter `values` [nnz], in row-major order of the mask.

Gradients and optimizer state are nnz long because the parameter is. The forward is a pure function of `values` and
the pattern, so `functional_call` computes from the values it is given. `state_dict()` is that of the masked state.

Strategy "cpu" multiplies CSR matrices. Strategy "dense" keeps a shadow, the dense weight with zeros, which whoever
writes `values` refreshes: an optimizer through the step hook, others with `lth_sparse.sync_`.
"""

import torch
from torch import Tensor, nn

from . import ops
from .nn import MaskedLayer, MaskedLinear
from .optim import attach_shadow, replace, require_elementwise


class PackedLayer(MaskedLayer):
    """What every packed layer adds: `values`, the pattern, and `weight` and `weight_mask` made from them on demand."""

    masked_class: type[MaskedLayer]

    def pack_(self, strategy: str) -> None:
        """Become packed: `weight` and its mask give way to `values` and a pattern on the same device."""
        mask, weight = self.weight_mask, self.weight
        self.strategy, self.bits, self.packed_shape = strategy, ops.pack_bits(mask), tuple(weight.shape)
        self.pattern = ops.csr(mask) if strategy == "cpu" else ops.bitmap(mask[None])
        del self._parameters["weight"], self._buffers["weight_mask"]
        values = nn.Parameter(weight.detach()[mask], requires_grad=weight.requires_grad)
        # first, as `weight` was, so that optimizers number the parameters alike in both states
        self._parameters = {"values": values, **self._parameters}
        replace(weight)
        self._adopt()

    def _adopt(self):
        """Tell the optimizers what `values` are; copies of a Parameter forget it."""
        require_elementwise(self.values)
        if self.strategy == "dense":
            self.shadow = self.weight.detach()
            attach_shadow(self.values, self.shadow, self.pattern)

    def __setstate__(self, state):
        super().__setstate__(state)
        self._adopt()

    def unpack_(self) -> None:
        """Become masked again, with the same values."""
        weight, mask = self.weight.detach(), self.weight_mask
        values = self._parameters.pop("values")
        for name in ("pattern", "bits", "packed_shape", "strategy", "shadow"):
            self.__dict__.pop(name, None)
        self.__class__ = self.masked_class
        self.register_buffer("weight_mask", mask)
        parameters, self._parameters = self._parameters, {}
        self.register_parameter("weight", nn.Parameter(weight, requires_grad=values.requires_grad))
        self._parameters |= parameters
        self.sync_()
        replace(values)

    @property
    def weight(self) -> Tensor:
        """The dense weight, zero off the mask; differentiable in `values`, but no parameter."""
        values = self.values
        return values.new_zeros(self.packed_shape).masked_scatter(self.weight_mask, values)

    @property
    def weight_mask(self) -> Tensor:
        return ops.unpack_bits(self.bits, self.packed_shape)

    def sync_(self) -> "PackedLayer":
        """Refresh the shadow, where there is one, after somebody wrote `values`."""
        if self.strategy == "dense":
            ops.refresh_(self.shadow, self.values.detach(), *self.pattern)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise ValueError("a packed layer has no weight to assign: call lth_sparse.unpack_(model) first")
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = self.values.device
        self.pattern = type(self.pattern)(*(index.to(device) for index in self.pattern))
        self.bits = self.bits.to(device)
        self._adopt()
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "weight"] = self.weight if keep_vars else self.weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()
        destination[prefix + "weight_mask"] = self.weight_mask

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        mask = self.weight_mask
        given = state_dict.get(prefix + "weight_mask", mask)
        weight = state_dict.get(prefix + "weight")
        if weight is None:
            missing.append(prefix + "weight")
        elif weight.shape != mask.shape or not torch.equal(given.bool().to(mask.device), mask):
            errors.append(f"{prefix}weight has another shape or mask than the packed layer: call unpack_(model) first")
        else:
            with torch.no_grad():
                self.values.copy_(weight.to(mask.device)[mask])
            self.sync_()
        rest = {prefix + "bias": state_dict[prefix + "bias"]} if prefix + "bias" in state_dict else {}
        unwanted: list[str] = []
        nn.Module._load_from_state_dict(self, rest, prefix, metadata, False, [], unwanted, errors)
        if self.bias is not None and not rest:
            missing.append(prefix + "bias")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.values.numel()}"


def refuse_packed(model: nn.Module, verb: str) -> None:
    """ValueError if a layer of `model` is packed: its masks and values are fixed for the optimizer that trains them."""
    packed = [name for name, layer in model.named_modules() if isinstance(layer, PackedLayer)]
    if packed:
        raise ValueError(f"{verb} changes masks or values, but {packed[0]!r} is packed: call unpack_(model) first")


class PackedLinear(PackedLayer, MaskedLinear):
    """`nn.Linear` trained by its kept values; float32 or float64 on the CPU."""

    masked_class = MaskedLinear

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, self.in_features)
        if self.strategy == "cpu":
            output = ops.csr_linear(rows, self.values, self.bias, *self.pattern)
        else:
            # functional_call hands in other values: the shadow is made from those
            shadow = self.shadow if isinstance(self.values, nn.Parameter) else self.weight.detach()
            output = ops.shadow_linear(rows, self.values, shadow, self.bias, *self.pattern)
        return output.view(*input.shape[:-1], self.out_features)


PACKED_CLASSES = {MaskedLinear: PackedLinear}
