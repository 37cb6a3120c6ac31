"""From a mask's bitmap to places in the packed values, for the epilogues and prologues of the kernels."""

import triton
import triton.language as tl


@triton.jit
def popcount(word):
    """Set bits of each int32, in plain arithmetic, which the interpreter can run too; LLVM makes one POPC of it."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24) & 0xFF


@triton.jit
def places(words, offsets, row, first_column, n_rows, n_words, COLUMNS: tl.constexpr):
    """Whether each position of a tile [ROWS, COLUMNS] is kept, and its place in the packed values."""
    rows: tl.constexpr = row.shape[0]
    column = first_column // 32 + tl.arange(0, COLUMNS // 32)
    inside = (row < n_rows)[:, None] & (column < n_words)[None, :]
    at = row[:, None] * n_words + column[None, :]
    word = tl.load(words + at, mask=inside, other=0)[:, :, None]
    offset = tl.load(offsets + at, mask=inside, other=0)[:, :, None]
    bit = tl.arange(0, 32)[None, None, :]
    kept = (word >> bit) & 1
    place = offset + popcount(word & ((1 << bit) - 1))
    return tl.reshape(kept == 1, (rows, COLUMNS)), tl.reshape(place, (rows, COLUMNS))


@triton.jit
def fours(words, offsets, row, first_column, n_rows, n_words, COLUMNS: tl.constexpr):
    """Word and offset of every 4 columns of a tile [ROWS, COLUMNS], for `expanded`: int32 [ROWS, COLUMNS / 4]."""
    column = first_column // 32 + tl.arange(0, COLUMNS // 4) // 8
    inside = (row < n_rows)[:, None] & (column < n_words)[None, :]
    at = row[:, None] * n_words + column[None, :]
    return tl.load(words + at, mask=inside, other=0), tl.load(offsets + at, mask=inside, other=0)


@triton.jit
def expanded(values, word, offset):
    """The tile [ROWS, COLUMNS] of the weight with its zeros, from what `fours` loaded.

    A thread expands 4 neighbours: it counts bits once for them and steps a pointer from kept weight to kept weight.
    """
    rows: tl.constexpr = word.shape[0]
    groups: tl.constexpr = word.shape[1]
    shift = (tl.arange(0, groups) % 8 * 4)[None, :]
    at = values + (offset + popcount(word & ((1 << shift) - 1)))
    bits = word >> shift
    first = tl.load(at, mask=(bits & 1) != 0, other=0.0)
    at = tl.where((bits & 1) != 0, at + 1, at)
    second = tl.load(at, mask=(bits & 2) != 0, other=0.0)
    at = tl.where((bits & 2) != 0, at + 1, at)
    third = tl.load(at, mask=(bits & 4) != 0, other=0.0)
    at = tl.where((bits & 4) != 0, at + 1, at)
    fourth = tl.load(at, mask=(bits & 8) != 0, other=0.0)
    return tl.reshape(tl.join(tl.join(first, third), tl.join(second, fourth)), (rows, groups * 4))
