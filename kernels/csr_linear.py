"""A linear layer that multiplies kept weights only, one by one, on the CUDA cores.

Each weight takes one line of 128 bytes of input: 32 (float32) or 64 (16 bits) consecutive columns of the batch. So the
batch must be contiguous in memory, and the first product pays for it: `batch_last` moves 8 bytes per element, by model
5% of the time of a 4096 x 4096 layer at 95% sparsity; what it returns, and what the products return, is not copied
again. Source: row swizzle and sampled product of Sputnik (Gale et al. 2020), with the batch contiguous as in
SparseProp (Nikdan et al. 2023). Non-finite inputs reach exactly the outputs that keep a weight for them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .groups import Groups
from .operands import DTYPES

LINE = 128  # bytes: 8 lanes read a line of x, so that a warp works at 4 rows
STEPS, RAGGED = 8, 4  # weights per step of all rows of a program, and of the rows that are longer than the shortest
SAMPLES = 128  # of the batch per step of the weight gradient, which takes 4 weights of each row at a time
REGISTERS = 128  # for it: left alone, the assembler spills 16 bytes of the float32 kernel to reach 80


@triton.jit
def _line(index, stride):
    """Offset of line `index`. Strides count 16 elements: 3 instructions in 32 bits then reach 2**35 of them, not 6."""
    return (index * stride).to(tl.int64) * 16


@triton.jit
def _add_products(sums, x, x_stride, values, indices, left, STEPS: tl.constexpr):
    """Add the next `STEPS` weights of each row times their lines of x; `left`, if given, says how many there are."""
    other: tl.constexpr = None if left is None else 0
    for step in tl.static_range(STEPS):
        inside = None if left is None else step < left
        value = tl.load(values + step, mask=inside, other=other).to(tl.float32)
        index = tl.load(indices + step, mask=inside, other=other).to(tl.int32)
        at = x + _line(index, x_stride)[:, None]
        line = tl.load(at, mask=None if left is None else inside[:, None], other=other).to(tl.float32)
        sums += value[:, None] * line
    return sums


@triton.jit
def _multiply_kernel(
    x, values, starts, indices, long_rows, bias, y,
    n_rows, n_groups, nnz, x_ticket, x_stride, y_stride,
    HAS_BIAS: tl.constexpr, RELU: tl.constexpr,
    ROWS: tl.constexpr, BATCH: tl.constexpr, STEPS: tl.constexpr, RAGGED: tl.constexpr,
):  # fmt: skip
    ticket = tl.program_id(1).to(tl.int64)
    # neighbours work at the same part of the batch, whose lines they find in the caches
    slot = tl.program_id(0) % n_groups * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) // n_groups * BATCH + tl.arange(0, BATCH)[None, :]
    row = tl.load(long_rows + ticket * n_rows + tl.minimum(slot, n_rows - 1))
    starts += ticket * (n_rows + 1) + row
    start = tl.load(starts)
    length = tl.load(starts + 1) - start
    x += ticket * x_ticket + b
    values += ticket * nnz + start
    indices += ticket * nnz + start
    sums = tl.zeros((ROWS, BATCH), tl.float32)
    common = tl.min(length) // STEPS * STEPS
    for i in range(0, common, STEPS):
        sums = _add_products(sums, x, x_stride, values + i, indices + i, None, STEPS)
    for i in range(common, tl.max(length), RAGGED):
        sums = _add_products(sums, x, x_stride, values + i, indices + i, length - i, RAGGED)
    if HAS_BIAS:
        sums += tl.load(bias + ticket * n_rows + row).to(tl.float32)[:, None]
    if RELU:
        sums = tl.where(sums < 0, 0.0, sums)
    y += (ticket * n_rows + row[:, None]) * y_stride + b
    tl.store(y, sums.to(y.dtype.element_ty), mask=(slot < n_rows)[:, None])


@triton.jit
def _reorder_kernel(values, order, reordered, nnz, BLOCK: tl.constexpr):
    ticket = tl.program_id(1).to(tl.int64)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = tl.load(order + ticket * nnz + at, mask=at < nnz, other=0)
    value = tl.load(values + ticket * nnz + place, mask=at < nnz, other=0.0)
    tl.store(reordered + ticket * nnz + at, value, mask=at < nnz)


@triton.jit
def _add_samples(sums, dy, lines, i, inside):
    """Add a line of dy times those of four weights, [ROWS, BATCH] each; all may be NaN where not `inside`, if given."""
    dy_line = tl.load(dy + i).to(tl.float32)
    a, b = tl.load(lines[0] + i).to(tl.float32), tl.load(lines[1] + i).to(tl.float32)
    c, d = tl.load(lines[2] + i).to(tl.float32), tl.load(lines[3] + i).to(tl.float32)
    if inside is not None:
        dy_line, a, b = tl.where(inside, dy_line, 0.0), tl.where(inside, a, 0.0), tl.where(inside, b, 0.0)
        c, d = tl.where(inside, c, 0.0), tl.where(inside, d, 0.0)
    return sums[0] + dy_line * a, sums[1] + dy_line * b, sums[2] + dy_line * c, sums[3] + dy_line * d


@triton.jit
def _lines(x, x_stride, columns, left):
    """Where the lines of the next four weights of each row begin."""
    a = tl.load(columns, mask=left > 0, other=0).to(tl.int32)
    b = tl.load(columns + 1, mask=left > 1, other=0).to(tl.int32)
    c = tl.load(columns + 2, mask=left > 2, other=0).to(tl.int32)
    d = tl.load(columns + 3, mask=left > 3, other=0).to(tl.int32)
    a, b, c, d = _line(a, x_stride), _line(b, x_stride), _line(c, x_stride), _line(d, x_stride)
    return x + a[:, None], x + b[:, None], x + c[:, None], x + d[:, None]


@triton.jit
def _weight_gradient_kernel(
    dy, x, starts, columns, long_rows, gradient, bias_gradient,
    batch, n_rows, n_parts, nnz, dy_ticket, dy_stride, x_ticket, x_stride,
    HAS_BIAS: tl.constexpr, ROWS: tl.constexpr, BATCH: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    ticket = tl.program_id(2).to(tl.int64)
    slot = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    row = tl.load(long_rows + ticket * n_rows + tl.minimum(slot, n_rows - 1))
    starts += ticket * (n_rows + 1) + row
    start = tl.load(starts)
    length = tl.where(slot < n_rows, tl.load(starts + 1) - start, 0)
    columns += ticket * nnz + start
    gradient += ticket * nnz + start
    b = tl.arange(0, BATCH)[None, :]
    dy += ticket * dy_ticket + _line(row, dy_stride)[:, None] + b
    x += ticket * x_ticket + b
    zeros = tl.zeros((ROWS, BATCH), tl.float32)
    whole = batch // (BATCH * BLOCKS) * (BATCH * BLOCKS)
    # part p takes weights 4 p to 4 p + 3 of every row: near columns, so that the rows share lines of x
    for first in range(tl.program_id(1) * 4, tl.max(length), n_parts * 4):
        lines = _lines(x, x_stride, columns + first, length - first)
        sums = zeros, zeros, zeros, zeros
        for i in range(0, whole, BATCH * BLOCKS):
            for j in tl.static_range(BLOCKS):
                sums = _add_samples(sums, dy, lines, i + j * BATCH, None)
        for i in range(whole, batch, BATCH):
            sums = _add_samples(sums, dy, lines, i, i + b < batch)
        for j in tl.static_range(4):
            tl.store(gradient + first + j, tl.sum(sums[j], 1), mask=first + j < length)
    if HAS_BIAS and tl.program_id(1) == 0:
        total = zeros
        for i in range(0, batch, BATCH):
            total += tl.where(i + b < batch, tl.load(dy + i).to(tl.float32), 0.0)
        tl.store(bias_gradient + ticket * n_rows + row, tl.sum(total, 1), mask=slot < n_rows)


def forward(x: Tensor, values: Tensor, groups: Groups, bias: Tensor | None = None, relu: bool = False) -> Tensor:
    """y = x W^T + b, and max(y, 0) if `relu`, of R linear layers at once; sums are float32.

    Args:
        x: input [R, B, K], float32, bfloat16 or float16, any strides; R may be a stride-0 expansion.
        values: kept weights [R, nnz] in row-major order, of any of these dtypes; so is `bias` [R, N].
        groups: of the masks [R, N, K], on the same device.

    Returns:
        y [R, B, N] in the dtype of x, its batch contiguous in memory.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit together.
    """
    _check({"x": (x, groups.column_starts.shape[1] - 1)}, groups, values=values, bias=bias)
    return _multiply(x, values, groups.row_starts, groups.columns, groups.long_rows, bias, relu)


def input_gradient(dy: Tensor, values: Tensor, groups: Groups) -> Tensor:
    """dx = dy W [R, B, K] for dy [R, B, N], the same product over columns; arguments and errors as in `forward`.

    The values are copied into column-major order first: 44 bytes per weight once, where looking each one up would
    take 38 for every 32 columns of the batch.
    """
    _check({"dy": (dy, groups.row_starts.shape[1] - 1)}, groups, values=values)
    tickets, nnz = values.shape
    reordered = torch.empty_like(values, memory_format=torch.contiguous_format)
    if nnz:
        grid = (triton.cdiv(nnz, 1024), tickets)
        _reorder_kernel[grid](values.contiguous(), groups.order, reordered, nnz, BLOCK=1024, num_warps=4)
    return _multiply(dy, reordered, groups.column_starts, groups.rows, groups.long_columns, None, False)


def weight_gradient(dy: Tensor, x: Tensor, groups: Groups, bias: bool = True) -> tuple[Tensor, Tensor | None]:
    """Gradient of the kept weights, sum_b dy[b, n] x[b, k], and of the bias, for dy [R, B, N] and x [R, B, K].

    Each is summed by one program in a fixed order. Dtypes, strides and errors as in `forward`.

    Returns:
        gradient float32 [R, nnz] in row-major order of the masks, and float32 [R, N] or None.
    """
    sizes = groups.row_starts.shape[1] - 1, groups.column_starts.shape[1] - 1
    _check({"dy": (dy, sizes[0]), "x": (x, sizes[1])}, groups)
    (tickets, batch, n_rows), nnz = dy.shape, groups.columns.shape[1]
    dy, x, line = batch_last(dy), batch_last(x), LINE // x.element_size()
    gradient = torch.empty(tickets, nnz, dtype=torch.float32, device=dy.device)
    bias_gradient = torch.empty(tickets, n_rows, dtype=torch.float32, device=dy.device) if bias else None
    parts = min(max(1, triton.cdiv(nnz, max(1, n_rows) * 4)), 2**16 - 1)
    rows = _rows(32, n_rows, parts * tickets)
    if n_rows:
        _weight_gradient_kernel[triton.cdiv(n_rows, rows), parts, tickets](
            dy, x, groups.row_starts, groups.columns, groups.long_rows, gradient, bias_gradient,
            batch, n_rows, parts, nnz, dy.stride(0), dy.stride(2) // 16, x.stride(0), x.stride(2) // 16,
            HAS_BIAS=bias, ROWS=rows, BATCH=line, BLOCKS=SAMPLES // line,
            num_warps=rows // 4, maxnreg=REGISTERS,
        )  # fmt: skip
    return gradient, bias_gradient


def batch_last(tensor: Tensor) -> Tensor:
    """The same [R, B, C], batch contiguous, each column on a line of its own and readable to the end of its last line.

    Without a copy if it is so already, as are the results of this module; keep it to multiply by it again.
    """
    if tensor.shape[0] > 1 and tensor.stride(0) == 0:
        return batch_last(tensor[:1]).expand(tensor.shape)
    tickets, batch, columns = tensor.shape
    line = LINE // tensor.element_size()
    padded = triton.cdiv(batch, line) * line
    ticket, step, column = tensor.stride()
    end = tensor.storage_offset() + (tickets - 1) * ticket + (columns - 1) * column + padded
    aligned = (ticket | column | tensor.storage_offset()) % line == 0
    if step == 1 and aligned and end * tensor.element_size() <= tensor.untyped_storage().nbytes():
        return tensor
    memory = torch.empty(tickets, columns, padded, dtype=tensor.dtype, device=tensor.device)
    return memory[:, :, :batch].transpose(1, 2).copy_(tensor)


def _multiply(x, values, starts, indices, long_rows, bias, relu):
    (tickets, batch, _), n_rows = x.shape, long_rows.shape[1]
    line = LINE // x.element_size()
    tiles = triton.cdiv(batch, line)
    x = batch_last(x)
    y = torch.empty(tickets, n_rows, tiles * line, dtype=x.dtype, device=x.device)
    rows = _rows(64, n_rows, tiles * tickets)
    n_groups = triton.cdiv(n_rows, rows)
    if y.numel():
        _multiply_kernel[n_groups * tiles, tickets](
            x, values.contiguous(), starts, indices, long_rows, bias if bias is None else bias.contiguous(), y,
            n_rows, n_groups, values.shape[1], x.stride(0), x.stride(2) // 16, y.stride(1),
            HAS_BIAS=bias is not None, RELU=relu, ROWS=rows, BATCH=line, STEPS=STEPS, RAGGED=RAGGED,
            num_warps=rows // 4,
        )  # fmt: skip
    return y[:, :, :batch].transpose(1, 2)


def _rows(many: int, n_rows: int, programs: int) -> int:
    """Rows per program: `many` share lines of x in an L1 cache, if that makes two programs for each of 132 SMs."""
    return many if triton.cdiv(n_rows, many) * programs >= 264 else 16


def _check(inputs, groups, values=None, bias=None):
    (tickets, nnz), n_rows = groups.columns.shape, groups.row_starts.shape[1] - 1
    batch = next(iter(inputs.values()))[0].shape[1:2]
    wanted = {name: (tensor, (tickets, *batch, size)) for name, (tensor, size) in inputs.items()}
    wanted |= {"values": (values, (tickets, nnz)), "bias": (bias, (tickets, n_rows))}
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)} for these masks, got {list(tensor.shape)}")
        if tensor is not None and (tensor.dtype not in DTYPES or tensor.device != groups.order.device):
            raise ValueError(
                f"{name} must be float32, bfloat16 or float16 on {groups.order.device} as the masks are, "
                f"got {tensor.dtype} on {tensor.device}"
            )
    if len(dtypes := {tensor.dtype for tensor, _ in inputs.values()}) > 1:
        raise ValueError(f"dy and x must have one dtype, got {' and '.join(sorted(map(str, dtypes)))}")
