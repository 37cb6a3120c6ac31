"""Index structure of masks whose kept weights are multiplied one by one: lists by row and by column."""

from typing import NamedTuple

import torch
from torch import Tensor

from .pattern import kept_weights


class Groups(NamedTuple):
    """Where the kept weights of R masks [N, K] lie, by rows and by columns, and which of those are long.

    `row_starts` int32 [R, N + 1] and `columns` [R, nnz] in row-major order, the order of the packed values;
    `column_starts` int32 [R, K + 1] and `rows` [R, nnz] in column-major order, `order` int32 [R, nnz] taking packed
    values into it. `columns` and `rows` ascend in each list; they are uint16 where they fit (2 bytes to read per
    weight, and no sign to extend), else int32. `long_rows` int32 [R, N] and `long_columns` int32 [R, K] start at the
    longest list: neighbours there have nearly equal lengths, so that the threads of a program idle during 1% (of lists
    of 200) to 11% (of 20) of the steps; in the order of the matrix it would be 30 to 140%.
    """

    row_starts: Tensor
    columns: Tensor
    long_rows: Tensor
    column_starts: Tensor
    rows: Tensor
    long_columns: Tensor
    order: Tensor


def groups(masks: Tensor) -> Groups:
    """The `Groups` of bool `masks` [R, N, K]; longest first is the row swizzle of Sputnik (Gale et al. 2020, sec. 5).

    Raises:
        ValueError: masks that are not 3-D bool; tickets that keep different numbers of weights, or more than 2**31 - 1.
    """
    if masks.dim() != 3 or masks.dtype != torch.bool:
        raise ValueError(f"masks must be bool [R, N, K], got {masks.dtype} {tuple(masks.shape)}")
    nnz = kept_weights(masks)
    tickets, n_rows, n_columns = masks.shape
    _, rows, columns = masks.nonzero().view(tickets, nnz, 3).unbind(2)
    order = columns.sort(dim=1, stable=True).indices
    by_row, by_column = masks.sum(2), masks.sum(1)
    return Groups(
        _starts(by_row),
        _narrow(columns, n_columns),
        _longest_first(by_row),
        _starts(by_column),
        _narrow(rows.gather(1, order), n_rows),
        _longest_first(by_column),
        order.int(),
    )


def _starts(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(1), (1, 0)).int()


def _longest_first(counts: Tensor) -> Tensor:
    return counts.argsort(dim=1, descending=True, stable=True).int()


def _narrow(indices: Tensor, size: int) -> Tensor:
    return indices.to(torch.uint16 if size <= 2**16 else torch.int32, memory_format=torch.contiguous_format)
