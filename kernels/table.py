"""Many tensors in one launch: their addresses in a table on the device, and how a kernel reads blocks of them.

A kernel that takes its tensors from a table takes any number of them, is compiled once, and can be captured in a CUDA
graph. Blocks that are whole and aligned move 16 bytes at a time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # entries a program: two vectors of 16 bytes from each tensor for a thread of 4 warps
# A row: the addresses of an `Update` in its order (0: it has none), whether its shadow is bfloat16, its size, the size
# again if all that is read in vectors is aligned (else 0), and its first block.
VALUE, GRADIENT, FIRST, SECOND = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
STEP, SHADOW, KEPT, HALF = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
SIZE, ALIGNED, FIRST_BLOCK, COLUMNS = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)


class Update(NamedTuple):
    """One parameter and what its update reads and writes, all on one device.

    `value`, `gradient` and the moments `first` and `second` (SGD has one at most) are float32, of one shape and with
    the same dense strides; `step` is float32 with one entry. `shadow`, float32 or bfloat16, is the dense form of packed
    values, and `kept` int32 the place in its memory of each of them.
    """

    value: Tensor
    gradient: Tensor
    first: Tensor | None = None
    second: Tensor | None = None
    step: Tensor | None = None
    shadow: Tensor | None = None
    kept: Tensor | None = None


class Table(NamedTuple):
    """`tensors` updates as kernels read them: `cells` int64 on the device, copied from `host`.

    A count of the blocks that have begun, a row for each tensor, and the tensor of each of the `blocks`. `fields` are
    what every update has. It holds addresses and keeps no tensor alive; a graph that captured the copy reads `host`
    again whenever it is replayed.
    """

    cells: Tensor
    host: Tensor
    tensors: int
    blocks: int
    fields: frozenset[str]

    def require(self, *fields: str) -> None:
        """ValueError if one of `fields` is missing in an update: the kernel would read address 0."""
        if missing := [field for field in fields if field not in self.fields]:
            raise ValueError(f"every update of this step needs {', '.join(fields)}, got one without {missing[0]}")


def table(updates: Sequence[Update]) -> Table:
    """The `Table` of `updates`, good until one of their tensors moves; the host does not wait for the copy.

    Raises:
        ValueError: no update, one that is not as `Update` says, or several devices.
    """
    for reason in map(unfit, updates):
        if reason:
            raise ValueError(reason)
    devices = {update.value.device for update in updates}
    if len(devices) != 1:
        raise ValueError(f"a table is of tensors on one device, got {len(updates)} on {sorted(map(str, devices))}")
    rows, owners = [], []
    for at, update in enumerate(updates):
        rows += [*_row(update), len(owners)]
        owners += [at] * max(1, triton.cdiv(update.value.numel(), BLOCK))  # an empty tensor has a step to count too
    (device,) = devices
    # the allocator of pinned memory asks for events, which a capture forbids; graphs copy from any memory
    pin = device.type == "cuda" and not torch.cuda.is_current_stream_capturing()
    host = torch.tensor([0, *rows, *owners], dtype=torch.int64, device="cpu", pin_memory=pin)
    fields = frozenset(name for at, name in enumerate(Update._fields) if all(u[at] is not None for u in updates))
    return Table(host.to(device, non_blocking=True), host, len(updates), len(owners), fields)


def _row(update):
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in update]
    vectors = (*addresses[: STEP.value], addresses[KEPT.value])
    half, size = update.shadow is not None and update.shadow.dtype == torch.bfloat16, update.value.numel()
    return *addresses, half, size, size if all(address % 16 == 0 for address in vectors) else 0


def unfit(update: Update) -> str:
    """Why a table cannot hold `update`, in one sentence; "" if it can."""
    value, gradient, first, second, step, shadow, kept = update
    same = [tensor for tensor in (value, gradient, first, second) if tensor is not None]
    if any(t.layout != torch.strided or t.shape != value.shape or _strides(t) != _strides(value) for t in same) or not (
        value.is_contiguous() or torch.empty_like(value).stride() == value.stride()
    ):
        return f"a value, its gradient and moments must be dense and alike in memory, got {', '.join(map(_form, same))}"
    places = [] if shadow is None else [shadow, kept]
    if places and (shadow.numel() >= 2**31 or not shadow.is_contiguous() or kept.shape != (value.numel(),)):
        return f"a shadow is contiguous, below 2**31, with a place for each value, got {', '.join(map(_form, places))}"
    floats = [*same, *([step] if step is not None else [])]
    fits = all(t.dtype == torch.float32 for t in floats) and (step is None or step.numel() == 1)
    if places:
        fits = fits and shadow.dtype in (torch.float32, torch.bfloat16) and kept.dtype == torch.int32
    if not fits or any(t.device != value.device for t in (*floats, *places)):
        return f"an update is float32 with a step of one entry on one device, got {', '.join(map(_form, update))}"
    return ""


def _strides(tensor):
    return tensor.squeeze().stride()  # in a dimension of size 1 any stride is the same


def _form(tensor):
    return "none" if tensor is None else f"{str(tensor.dtype)[6:]} {tuple(tensor.shape)} on {tensor.device}"


@triton.jit
def find(cells, n_tensors, BLOCK: tl.constexpr):
    """This block's row, its first entry in the tensor, how many are left from there, and whether it is whole."""
    block = tl.program_id(0)
    row = cells + 1 + tl.load(cells + 1 + n_tensors * COLUMNS + block) * COLUMNS
    begin = (block - tl.load(row + FIRST_BLOCK)) * BLOCK
    return row, begin, tl.load(row + SIZE) - begin, tl.load(row + ALIGNED) - begin >= BLOCK


@triton.jit
def load(row, COLUMN: tl.constexpr, begin, left, WHOLE: tl.constexpr, BLOCK: tl.constexpr, TYPE: tl.constexpr):
    """A block of the tensor in a column; a mask would load 4 bytes at a time where WHOLE loads 16."""
    start = tl.load(row + COLUMN).to(tl.pointer_type(TYPE)) + begin
    at = tl.arange(0, BLOCK)
    if WHOLE:
        return tl.load(tl.multiple_of(start, 16) + at)
    else:
        return tl.load(start + at, mask=at < left, other=0)


@triton.jit
def store(row, COLUMN: tl.constexpr, begin, left, entries, WHOLE: tl.constexpr, BLOCK: tl.constexpr):
    """Write a block of the float32 tensor in a column."""
    start = tl.load(row + COLUMN).to(tl.pointer_type(tl.float32)) + begin
    at = tl.arange(0, BLOCK)
    if WHOLE:
        tl.store(tl.multiple_of(start, 16) + at, entries)
    else:
        tl.store(start + at, entries, mask=at < left)
