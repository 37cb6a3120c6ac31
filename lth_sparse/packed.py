"""Packed layers: a pruned weight does not exist. One parameter `values` [nnz] holds the kept weights.

They lie in row-major order of the mask, of a convolution's mask channels last. Gradients and optimizer state are nnz
long because the parameter is. The forward is a pure function of `values` and the pattern, so `functional_call`
computes from the values it is given. `state_dict()` is that of the masked state.

Some strategies keep a shadow, the dense weight with zeros, which whoever writes `values` refreshes: an optimizer in its
step or through the step hook, others with `lth_sparse.sync_`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .hooks import attach_shadow, replace, require_elementwise
from .nn import MaskedConv2d, MaskedLayer, MaskedLinear


class PackedLayer(MaskedLayer):
    """What every packed layer adds: `values`, the pattern, and `weight` and `weight_mask` made from them on demand."""

    masked_class: type[MaskedLayer]
    kind: str

    @staticmethod
    def to_rows(weight: Tensor) -> Tensor:
        """A view [1, ...] of a weight or its mask, in the order of the values."""
        return weight[None]

    @staticmethod
    def from_rows(rows: Tensor) -> Tensor:
        return rows[0]

    def sizes(self) -> tuple[int, ...]:
        """What the operator must know beside the mask."""
        raise NotImplementedError

    def pack_(self, strategy: str) -> None:
        """Become packed: `weight` and its mask give way to `values` and a pattern on the same device."""
        weight, masks, rows = self.weight, self.to_rows(self.weight_mask), self.to_rows(self.weight.detach())
        self.strategy, self.bits, self.packed_shape = strategy, ops.pack_bits(masks), tuple(rows.shape)
        self.pattern = ops.STRATEGIES[self.kind][strategy].structures(masks, self.sizes())
        del self._parameters["weight"], self._buffers["weight_mask"]
        values = nn.Parameter(rows[masks], requires_grad=weight.requires_grad)
        # first, as `weight` was, so that optimizers number the parameters alike in both states
        self._parameters = {"values": values, **self._parameters}
        replace(weight)
        self.shadow = self._make_shadow(values.detach())
        self._adopt()

    def _adopt(self):
        """Tell the optimizers what `values` are; copies of a Parameter forget it."""
        require_elementwise(self.values)
        if self.shadow is not None:
            attach_shadow(self.values, self.shadow, self.pattern)

    def _make_shadow(self, values):
        live = ops.STRATEGIES[self.kind][self.strategy].live(self._masks())
        return None if live is None else values.new_zeros(live.shape).masked_scatter(live, values)

    def _masks(self):
        return ops.unpack_bits(self.bits, self.packed_shape)

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
        rows = self.values.new_zeros(self.packed_shape).masked_scatter(self._masks(), self.values)
        return self.from_rows(rows).contiguous()

    @property
    def weight_mask(self) -> Tensor:
        return self.from_rows(self._masks()).contiguous()

    def product(self, input: Tensor) -> Tensor:
        """The layer's linear map of an input [B, K] or [B, Cin, H, W], with the bias added."""
        ops.check_input(input, self.values, self.input_shape())
        self.note_capture(self.values)
        # functional_call hands in other values: the shadow is made from those
        shadow = self.shadow if isinstance(self.values, nn.Parameter) else self._make_shadow(self.values)
        return ops.packed(input, self.values, self.bias, shadow, self.pattern, self.sizes(), self.kind, self.strategy)

    def input_shape(self) -> tuple[int | None, ...]:
        """What `product` takes; None for any size."""
        raise NotImplementedError

    def sync_(self) -> "PackedLayer":
        """Refresh the shadow, where there is one, after somebody wrote `values`."""
        if self.shadow is not None:
            ops.refresh_(self.shadow, self.values.detach(), self.pattern)
        return self

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":
            raise ValueError("a packed layer has no weight to assign: call lth_sparse.unpack_(model) first")
        super().register_parameter(name, param)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        device = self.values.device
        self.pattern = tuple(index.to(device) for index in self.pattern)
        self.bits = self.bits.to(device)
        self.shadow = None if self.shadow is None else fn(self.shadow)
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
        if prefix + "weight_frozen" in state_dict:
            errors.append(f"{prefix}weight_frozen is for a masked layer: call unpack_(model) first")
        elif weight is None:
            missing.append(prefix + "weight")
        elif weight.shape != mask.shape or not torch.equal(given.bool().to(mask.device), mask):
            errors.append(f"{prefix}weight has another shape or mask than the packed layer: call unpack_(model) first")
        else:
            with torch.no_grad():
                self.values.copy_(self.to_rows(weight.to(mask.device))[self._masks()])
            self.sync_()
        rest = {prefix + "bias": state_dict[prefix + "bias"]} if prefix + "bias" in state_dict else {}
        unwanted: list[str] = []
        nn.Module._load_from_state_dict(self, rest, prefix, metadata, False, [], unwanted, errors)
        if self.bias is not None and not rest:
            missing.append(prefix + "bias")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={self.values.numel()}"


def product_shape(layer: nn.Module, input: Tensor) -> tuple[int, ...]:
    """The shape in which an input of a Linear or Conv2d reaches its product: as rows, or as padded images."""
    if isinstance(layer, nn.Linear):
        return input[..., 0].numel(), input.shape[-1]
    pads = layer._reversed_padding_repeated_twice if ops.pads_first(layer) else [0, 0, 0, 0]
    batch = (1, *input.shape) if input.dim() == 3 else tuple(input.shape)
    return *batch[:2], batch[2] + pads[2] + pads[3], batch[3] + pads[0] + pads[1]


def in_one_dtype(forward):
    """Run a packed layer's forward under autocast as its strategy can: in the autocast dtype, on the CPU in its own."""

    def run(layer, input):
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return forward(layer, input)
        dtype = layer.values.dtype if layer.strategy == "cpu" else torch.get_autocast_dtype(device)
        with torch.autocast(device, enabled=False):
            return forward(layer, input.to(dtype))

    return run


class PackedLinear(PackedLayer, MaskedLinear):
    """`nn.Linear` trained by its kept values."""

    masked_class, kind = MaskedLinear, "linear"

    def sizes(self) -> tuple[int, ...]:
        return (self.out_features,)

    def input_shape(self) -> tuple[int | None, ...]:
        return None, self.in_features

    @in_one_dtype
    def forward(self, input: Tensor) -> Tensor:
        if input.dim() == 2:
            return self.product(input)
        rows = input.unflatten(0, (1, -1)) if input.dim() == 1 else input.flatten(0, -2)
        return self.product(rows).view(*input.shape[:-1], self.out_features)


class PackedConv2d(PackedLayer, MaskedConv2d):
    """`nn.Conv2d` trained by its kept values."""

    masked_class, kind = MaskedConv2d, "conv2d"

    @staticmethod
    def to_rows(weight: Tensor) -> Tensor:
        return weight.permute(0, 2, 3, 1)[None]

    @staticmethod
    def from_rows(rows: Tensor) -> Tensor:
        return rows[0].permute(0, 3, 1, 2)

    def sizes(self) -> tuple[int, ...]:
        return ops.conv_sizes(self)

    def input_shape(self) -> tuple[int | None, ...]:
        return None, self.in_channels, None, None

    @in_one_dtype
    def forward(self, input: Tensor) -> Tensor:
        if ops.pads_first(self):
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            input = F.pad(input, self._reversed_padding_repeated_twice, mode)
        return self.product(input) if input.dim() == 4 else self.product(input[None])[0]


def refuse_packed(model: nn.Module, verb: str) -> None:
    """ValueError if a layer of `model` is packed: its masks and values are fixed for the optimizer that trains them."""
    packed = [name for name, layer in model.named_modules() if isinstance(layer, PackedLayer)]
    if packed:
        raise ValueError(f"{verb} changes masks or values, but {packed[0]!r} is packed: call unpack_(model) first")


PACKED_CLASSES = {MaskedLinear: PackedLinear, MaskedConv2d: PackedConv2d}
