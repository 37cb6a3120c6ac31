"""Masked layers: ordinary torch layers whose weight is exactly zero off a bool mask, and stays so.

The stored weight is zero there, so forward and input gradient need no mask; only the weight gradient is masked.
A layer is masked by class swap, so a `MaskedLinear` is an `nn.Linear` with the same parameters and names.
Pruned weights may be frozen at other values than zero: these lie in a buffer `weight_frozen`, zero on the mask, which
forward adds to the weight. A layer without such values has no such buffer.
"""

import warnings
import weakref
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from . import ops
from .hooks import adopt, clean_, is_clean, is_ours, mark_pruned


class MaskedLayer:
    """What every masked layer adds to its torch class: a `<name>_mask` buffer for each name in `masked_names()`."""

    dense_class: type[nn.Module]
    captured = False  # whether a CUDA graph was captured that may compute with the masks of now
    freezes = True  # whether pruned weights can be frozen: not where torch reads them past any forward of ours

    def masked_names(self) -> list[str]:
        return ["weight"]

    def sync_(self) -> "MaskedLayer":
        """Zero weight and gradient off the mask, in place, after somebody wrote weights or masks."""
        for name in self.masked_names():
            weight, mask = getattr(self, name), getattr(self, name + "_mask")
            clean_(weight, mask)
            if weight.grad is not None:
                weight.grad.masked_fill_(~mask, 0)
            mark_pruned(weight)
        self._sync_frozen()
        return self

    def freeze_(self, values: Tensor | None) -> None:
        """Hold the pruned weights at those of `values`, shaped like the weight, from now on; at zero with None."""
        self._buffers.pop("weight_frozen", None)
        if values is not None:
            with torch.inference_mode(False):  # as with masks
                self.register_buffer("weight_frozen", values.detach().to(self.weight, copy=True))
            self._sync_frozen()

    def _sync_frozen(self):
        frozen = self._buffers.get("weight_frozen")
        if frozen is not None:
            frozen.masked_fill_(self.weight_mask, 0)
            if not frozen.any():
                del self.weight_frozen

    def note_capture(self, tensor: Tensor) -> None:
        """Remember that a CUDA graph holds a forward of this layer, if one is being captured."""
        if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
            self.captured = True

    def refuse_captured(self, verb: str) -> None:
        """ValueError if a captured graph would go on computing with masks that `verb` is to change."""
        if self.captured:
            raise ValueError(
                f"{verb} would change masks or frozen weights of a layer under a captured CUDA graph, whose replays "
                "keep the old ones: discard the graph, call lth_sparse.sync_(model), and capture again afterwards"
            )

    def masked_weight(self) -> Tensor:
        """The weight and what is frozen, with a gradient that is zero off the mask."""
        self.note_capture(self.weight)
        if is_ours(self.weight):
            self._sync_if_written()
            weight = ops.mask_gradient(self.weight, self.weight_mask)
        else:
            weight = torch.where(self.weight_mask, self.weight, 0)
        return weight + self.weight_frozen if "weight_frozen" in self._buffers else weight

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)  # assigning a Parameter to the layer ends here
        if param is not None and name in self.masked_names():
            adopt(param, getattr(self, name + "_mask"))
            mark_pruned(param)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.captured = False  # a copy is in no graph
        self.sync_()  # copies of a Parameter forget that it is ours

    def _sync_if_written(self):
        # Version counters break the graph of torch.compile, and torch.where there costs 20 to 30% of a training step
        # (LeNet-300-100 and 1024 x 1024, one core): compiled, only optimizers and lth.sync_ keep weights clean.
        if torch.compiler.is_compiling():
            return
        for name in self.masked_names():
            weight = getattr(self, name)
            if is_ours(weight) and not is_clean(weight):
                clean_(weight, getattr(self, name + "_mask"))

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        names = self.masked_names()
        for name in names if self.captured else ():
            mask = getattr(self, name + "_mask")
            if not torch.equal(state_dict.get(prefix + name + "_mask", mask).to(mask), mask):
                self.refuse_captured("load_state_dict")
        self._make_room_for_frozen(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if prefix + "weight_frozen" in missing:
            missing.remove(prefix + "weight_frozen")
        for name in names:
            key = prefix + name + "_mask"
            if key in missing:
                missing.remove(key)
            self._buffers[name + "_mask"] = getattr(self, name + "_mask").bool()
            dropped = getattr(self, name).detach()[~getattr(self, name + "_mask")].any()
            if dropped and key not in state_dict:
                warnings.warn(
                    "the state dict brings no masks: masked layers keep theirs and drop the values off them",
                    stacklevel=2,
                )
        self.sync_()

    def _make_room_for_frozen(self, state_dict, prefix):
        """Have a buffer for the frozen weights of a state with some, and none for a state that has masks without."""
        has, given = "weight_frozen" in self._buffers, prefix + "weight_frozen" in state_dict
        if self.freezes and given and not has:
            self.refuse_captured("load_state_dict")
            self.register_buffer("weight_frozen", torch.zeros_like(self.weight))
        elif has and not given and prefix + "weight_mask" in state_dict:
            self.refuse_captured("load_state_dict")
            del self.weight_frozen


class MaskedLinear(MaskedLayer, nn.Linear):
    """`nn.Linear` with weight [out, in] zero off `weight_mask`.

    `fused`: whether our kernel computes the weight gradient, masked as it is stored; `pack_` finds out if that pays.
    """

    dense_class = nn.Linear
    fused = False

    def forward(self, input: Tensor) -> Tensor:
        weight, mask = self._parameters["weight"], self._buffers["weight_mask"]  # as attributes: 30 us a step
        if "weight_frozen" in self._buffers or not is_ours(weight) or torch.compiler.is_compiling():
            return F.linear(input, self.masked_weight(), self.bias)
        self.note_capture(weight)
        if not is_clean(weight):
            clean_(weight, mask)
        return ops.masked_linear(input, weight, mask, self._parameters["bias"], self.fused)


class MaskedOutProjection(MaskedLinear, NonDynamicallyQuantizableLinear):
    """The `out_proj` of `nn.MultiheadAttention`, which torch keeps from dynamic quantization by its type."""

    dense_class = NonDynamicallyQuantizableLinear
    freezes = False


class _MaskedConv(MaskedLayer):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, self.masked_weight(), self.bias)


class MaskedConv1d(_MaskedConv, nn.Conv1d):
    """`nn.Conv1d` with weight [out, in / groups, k] zero off `weight_mask`."""

    dense_class = nn.Conv1d


class MaskedConv2d(_MaskedConv, nn.Conv2d):
    """`nn.Conv2d` with weight [out, in / groups, kh, kw] zero off `weight_mask`."""

    dense_class = nn.Conv2d


class MaskedConv3d(_MaskedConv, nn.Conv3d):
    """`nn.Conv3d` with weight [out, in / groups, kd, kh, kw] zero off `weight_mask`."""

    dense_class = nn.Conv3d


class _MaskedConvTranspose(MaskedLayer):
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        padding = self._output_padding(
            input, output_size, self.stride, self.padding, self.kernel_size, len(self.kernel_size), self.dilation
        )
        convolve = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self.kernel_size) - 1]
        geometry = (self.stride, self.padding, padding, self.groups, self.dilation)
        return convolve(input, self.masked_weight(), self.bias, *geometry)


class MaskedConvTranspose1d(_MaskedConvTranspose, nn.ConvTranspose1d):
    """`nn.ConvTranspose1d` with weight [in, out / groups, k] zero off `weight_mask`."""

    dense_class = nn.ConvTranspose1d


class MaskedConvTranspose2d(_MaskedConvTranspose, nn.ConvTranspose2d):
    """`nn.ConvTranspose2d` with weight [in, out / groups, kh, kw] zero off `weight_mask`."""

    dense_class = nn.ConvTranspose2d


class MaskedConvTranspose3d(_MaskedConvTranspose, nn.ConvTranspose3d):
    """`nn.ConvTranspose3d` with weight [in, out / groups, kd, kh, kw] zero off `weight_mask`."""

    dense_class = nn.ConvTranspose3d


class MaskedMultiheadAttention(MaskedLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with its input projections zero off their masks.

    torch reads `in_proj_weight` and `out_proj.weight` past any forward of ours, so their gradients are masked by
    hooks. New parameters come without: each forward puts a missing one back.
    """

    dense_class = nn.MultiheadAttention
    freezes = False

    def masked_names(self) -> list[str]:
        if self._qkv_same_embed_dim:
            return ["in_proj_weight"]
        return ["q_proj_weight", "k_proj_weight", "v_proj_weight"]

    def forward(self, *args, **kwargs):
        if not torch.compiler.is_compiling():
            self.attach_hooks()
            for layer, name in self._projections():
                layer.note_capture(getattr(layer, name))
        self._sync_if_written()
        given = [(p, name, p._parameters[name]) for p, name in self._projections() if not is_ours(getattr(p, name))]
        try:
            for layer, name, weight in given:
                layer._parameters[name] = torch.where(getattr(layer, name + "_mask"), weight, 0)
            return super().forward(*args, **kwargs)
        finally:
            for layer, name, weight in given:
                layer._parameters[name] = weight

    def attach_hooks(self) -> None:
        """Mask the gradients of the projections that lack their hook."""
        for layer, name in self._projections():
            weight, hook = getattr(layer, name), _GradientHook(weakref.ref(layer), name)
            if is_ours(weight) and weight.requires_grad and hook not in (weight._backward_hooks or {}).values():
                weight.register_hook(hook)

    def __setstate__(self, state):
        super().__setstate__(state)
        self.attach_hooks()

    def _projections(self):
        names = [(self, name) for name in self.masked_names()]
        return [*names, (self.out_proj, "weight")] if isinstance(self.out_proj, MaskedLayer) else names

    def _sync_if_written(self):
        super()._sync_if_written()
        if isinstance(self.out_proj, MaskedLayer):
            self.out_proj._sync_if_written()


class _GradientHook(NamedTuple):
    layer: weakref.ref
    name: str

    def __call__(self, gradient):
        mask = getattr(self.layer(), self.name + "_mask", None)  # None: made dense again, or gone
        return gradient if mask is None else ops.apply_mask(gradient, mask)


MASKED_CLASSES = {
    masked.dense_class: masked
    for masked in (
        *(MaskedLinear, MaskedOutProjection, MaskedMultiheadAttention, MaskedConv1d, MaskedConv2d, MaskedConv3d),
        *(MaskedConvTranspose1d, MaskedConvTranspose2d, MaskedConvTranspose3d),
    )
}
