"""What a strategy is: the functions that compute a packed layer, and what they share."""

import importlib
from collections.abc import Callable, Iterable
from types import ModuleType

import torch
from torch import Tensor

library = torch.library.Library("lth_sparse", "FRAGMENT")
DEVICE_TYPES = {"cuda"}  # where the kernels run; on the CPU only Triton's interpreter could, for tests


class Strategy:
    """How packed layers of one kind are computed; stateless. Arguments not explained here are those of `ops.packed`."""

    def structures(self, masks: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
        """The index structures of the masks that the products take as `pattern`."""
        raise NotImplementedError

    def live(self, masks: Tensor) -> Tensor | None:
        """The part of the masks that the shadow covers; None if the strategy has no use for a shadow."""
        return None

    def forward(self, x, values, bias, shadow, pattern, sizes) -> Tensor:
        raise NotImplementedError

    def input_gradient(self, dy, values, shadow, pattern, sizes, shape) -> Tensor:
        """Gradient of the input of that shape."""
        raise NotImplementedError

    def weight_gradient(self, dy, x, values, pattern, sizes) -> tuple[Tensor, Tensor]:
        """Gradients of the values and of the bias, in float32 or wider."""
        raise NotImplementedError

    def activated(self, x, values, bias, shadow, pattern, sizes) -> Tensor:
        """ReLU of the forward."""
        return self.forward(x, values, bias, shadow, pattern, sizes).relu_()

    def gated(self, dy, values, shadow, pattern, sizes, shape, gate) -> Tensor:
        """Gradient by what went into the ReLU before, whose output `gate` was this layer's input."""
        dx = self.input_gradient(dy, values, shadow, pattern, sizes, shape)
        return torch.ops.aten.threshold_backward(dx, gate, 0)

    def arranged(self, x: Tensor) -> Tensor:
        """An input or output gradient in the memory order that the products want; itself if it is so already."""
        return x

    def empty(self, x: Tensor, shape: tuple[int, ...]) -> Tensor:
        """An output or input gradient of that shape, uninitialised, with the strides that it comes in."""
        return x.new_empty(shape)


class BatchLast(Strategy):
    """A strategy for Linear layers whose products want the batch contiguous in memory, and leave it so."""

    def arranged(self, x):
        return x if x.stride(1) == 1 else self.empty(x, x.shape).copy_(x)


def define(schema: str, function: Callable, fake: Callable) -> Callable:
    """An operator of ours: its dispatch costs 6 us a call, that of torch.library.custom_op 17 (torch 2.15)."""
    name = schema.partition("(")[0]
    library.define(schema)
    library.impl(name, function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lth_sparse::{name}", fake, lib=library)
    return getattr(torch.ops.lth_sparse, name).default


def kernels(module: str) -> ModuleType:
    """A module of kernels, imported when first used: Triton may be absent where none is."""
    return importlib.import_module(f"..kernels.{module}", __package__)


def launches(tensor: Tensor) -> bool:
    """Whether kernels are launched for `tensor`, where torch could compute too."""
    return tensor.device.type in DEVICE_TYPES


def precision() -> str:
    """How kernels multiply float32 matrices, by `torch.set_float32_matmul_precision`."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def picklable(indices: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The same with int16 for uint16, which torch 2.15 cannot pickle; `unsigned` undoes it."""
    return tuple(index.view(torch.int16) if index.dtype == torch.uint16 else index for index in indices)


def unsigned(indices: Iterable[Tensor]) -> tuple[Tensor, ...]:
    """The same with uint16 for int16."""
    return tuple(index.view(torch.uint16) if index.dtype == torch.int16 else index for index in indices)


def check_input(x: Tensor, values: Tensor, wanted: tuple[int | None, ...]) -> None:
    """Refuse an input of another shape (None: any size), device or dtype than suits the packed values.

    Raises:
        ValueError: saying what was given and what was wanted.
    """
    fits = x.dim() == len(wanted) and all(w in (None, size) for w, size in zip(wanted, x.shape, strict=True))
    mixed = values.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)  # as autocast would have it
    if not fits or x.device != values.device or (x.dtype != values.dtype and not mixed):
        shape = ", ".join("any" if size is None else str(size) for size in wanted)
        raise ValueError(
            f"a packed layer wants an input of shape ({shape}), {values.dtype} on {values.device}, "
            f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
        )
