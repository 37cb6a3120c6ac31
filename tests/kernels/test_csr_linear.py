"""Products of kept weights alone, against float64: forward, input gradient and weight gradient; and their lists."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracle import DEVICE, MASKS, close, make_masks, packed, random
from lth_sparse.kernels import csr_linear
from lth_sparse.kernels.csr_linear import batch_last, forward, input_gradient, weight_gradient
from lth_sparse.kernels.groups import Groups, groups

SHAPES = [(1, 60, 18, 44), (3, 33, 17, 13), (1, 1, 1, 1), (1, 257, 5, 12)]  # the interpreter takes 2 ms per weight
LOW = pytest.param("float16"), pytest.param("bfloat16", marks=pytest.mark.gpu)


def layer(kind, shape, dtype=torch.float32):
    """Masks, packed values, dense weight and bias of R layers N x K, with an input and an output gradient."""
    tickets, batch, n, k = shape
    masks = make_masks(kind, tickets, n, k)
    dense = random(tickets, n, k, dtype=dtype) * masks
    bias, x, dy = (random(tickets, *s, dtype=dtype, seed=i) for i, s in enumerate([(n,), (batch, k), (batch, n)]))
    return masks, packed(dense, masks), dense, bias, x, dy


def agrees(gradient, masks, dy, x):
    """Whether the packed gradient errs at most twice as much as torch's dense one, wherever that errs most."""
    theirs = dy.mT @ x
    return close(theirs.float().masked_scatter(masks, gradient), dy.double().mT @ x.double(), theirs)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_the_oracle(kind, shape):
    masks, values, dense, bias, x, _ = layer(kind, shape)
    y = forward(x, values, groups(masks), bias)
    wanted = x.double() @ dense.double().mT + bias.double()[:, None]
    assert y.dtype == torch.float32 and close(y, wanted, x @ dense.mT + bias[:, None])


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_gradient_equals_the_oracle(kind, shape):
    masks, values, dense, _, _, dy = layer(kind, shape)
    dx = input_gradient(dy, values, groups(masks))
    assert dx.dtype == torch.float32 and close(dx, dy.double() @ dense.double(), dy @ dense)


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_weight_gradient_equals_the_oracle(kind, shape):
    masks, values, _, _, x, dy = layer(kind, shape)
    gradient, bias = weight_gradient(dy, x, groups(masks))
    assert gradient.dtype == bias.dtype == torch.float32
    assert gradient.shape == values.shape and agrees(gradient, masks, dy, x)
    assert close(bias, dy.double().sum(1), dy.sum(1))


def results(x, dy, values, bias, index):
    return forward(x, values, index, bias), input_gradient(dy, values, index), *weight_gradient(dy, x, index)


def test_same_inputs_same_bits_whatever_the_rows_per_program(monkeypatch):
    masks, values, _, bias, x, dy = layer("random", (1, 20, 33, 45))
    runs = []
    for few in (True, True, False):
        monkeypatch.setattr(csr_linear, "_rows", lambda many, *_, few=few: 16 if few else many)
        runs.append(results(x, dy, values, bias, groups(masks)))
    assert all(torch.equal(one, other) for run in runs[1:] for one, other in zip(runs[0], run, strict=True))


def test_many_rows_per_program_need_many_programs():
    assert csr_linear._rows(64, 300, 2) == 16 and csr_linear._rows(64, 4096, 16) == 64


def test_options():
    masks, values, _, bias, x, dy = layer("random", (1, 4, 20, 40))
    y, gradient = forward(x, values, groups(masks), bias), weight_gradient(dy, x, groups(masks), bias=False)
    assert torch.equal(forward(x, values, groups(masks), bias, relu=True), y.relu()) and (y < 0).any()
    torch.testing.assert_close(forward(x, values, groups(masks)), y - bias[:, None])
    assert gradient[1] is None and not gradient[0].isnan().any()


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("wide", [False, True])
def test_low_precisions_err_no_more_than_torch(dtype, wide):
    dtype = getattr(torch, dtype)
    masks, values, dense, bias, x, dy = layer("random", (2, 70, 12, 45), dtype)
    values = values.float() if wide else values
    index = groups(masks)
    y, dx = forward(x, values, index, bias), input_gradient(dy, values, index)
    assert y.dtype == dx.dtype == dtype
    assert close(y, x.double() @ dense.double().mT + bias.double()[:, None], x @ dense.mT + bias[:, None])
    assert close(dx, dy.double() @ dense.double(), dy @ dense)
    gradient, bias_gradient = weight_gradient(dy, x, index)
    assert agrees(gradient, masks, dy, x)
    assert close(bias_gradient, dy.double().sum(1), dy.sum(1))


def test_indices_beyond_two_bytes():
    """A row of 65,537 columns: the last index would be 0 in 16 bits, and 65,535 negative in signed ones."""
    for width in (2**16, 2**16 + 1):
        mask = torch.zeros(1, 3, width, dtype=torch.bool, device=DEVICE)
        mask[0, 1, [0, 2**15, width - 1]] = True
        x, values = random(1, 2, width), torch.tensor([[1.0, 2.0, 4.0]], device=DEVICE)
        index = groups(mask)
        assert index.columns.dtype == (torch.uint16 if width == 2**16 else torch.int32)
        wanted = x[0, :, [0, 2**15, width - 1]] @ values[0]
        torch.testing.assert_close(forward(x, values, index)[0, :, 1], wanted)
        torch.testing.assert_close(
            weight_gradient(wanted[None, :, None].expand(-1, -1, 3), x, index)[0][0],
            (wanted @ x[0, :, [0, 2**15, width - 1]]),
        )


def test_any_strides_and_one_input_for_all_tickets():
    masks, values, dense, bias, x, dy = layer("random", (3, 20, 17, 25))
    index, shared = groups(masks), x[:1].expand(3, -1, -1)
    wide = torch.stack([values, values], 2)[:, :, 0]
    sliced = random(3, 60, 34)[:, ::3, ::2]
    assert torch.equal(forward(shared, wide, index, bias), forward(shared.contiguous(), values, index, bias))
    assert torch.equal(input_gradient(sliced, wide, index), input_gradient(sliced.contiguous(), values, index))
    assert torch.equal(weight_gradient(sliced, shared, index)[0], weight_gradient(sliced, shared.clone(), index)[0])
    assert batch_last(shared).stride(0) == 0


def test_results_are_taken_without_a_copy_and_other_layouts_are_not():
    masks, values, _, bias, x, dy = layer("random", (2, 60, 17, 20))
    for result in (forward(x, values, groups(masks), bias), input_gradient(dy, values, groups(masks)), batch_last(x)):
        assert batch_last(result) is result and result.stride(1) == 1
    memory = random(2, 40, 64)
    assert batch_last(memory.mT[:, :33]).data_ptr() == memory.data_ptr()  # 31 columns to spare
    last = random(1, 40 * 64 - 1).as_strided((1, 60, 40), (0, 1, 64))  # the last line would end outside
    for tensor in (last, memory[:, :, 1:].mT, random(2, 40, 60).mT, random(2, 40, 64, dtype=torch.float16).mT[:, 32:]):
        copy = batch_last(tensor)
        assert copy.data_ptr() != tensor.data_ptr() and torch.equal(copy, tensor)


def test_what_lies_past_the_batch_does_not_count():
    masks, values, dense, bias, _, _ = layer("random", (1, 1, 40, 50))
    x, dy = torch.full((1, 50, 64), torch.nan, device=DEVICE), torch.full((1, 40, 64), torch.inf, device=DEVICE)
    x[:, :, :37], dy[:, :, :37] = random(1, 50, 37), random(1, 40, 37)
    x, dy, index = x.mT[:, :37], dy.mT[:, :37], groups(masks)
    gradient, bias_gradient = weight_gradient(dy, x, index)
    torch.testing.assert_close(gradient, packed(dy.mT @ x, masks))
    torch.testing.assert_close(bias_gradient, dy.sum(1))
    torch.testing.assert_close(forward(x, values, index, bias), x @ dense.mT + bias[:, None])


def test_infinity_reaches_only_the_outputs_that_keep_a_weight_for_it():
    masks, values, _, _, x, _ = layer("random", (1, 4, 40, 50))
    x[0, 2, 0] = torch.inf
    finite = forward(x, values, groups(masks)).isfinite()
    assert torch.equal(~finite[0, 2], masks[0, :, 0]) and finite[0, [0, 1, 3]].all() and not finite.all()


@pytest.mark.parametrize("batch, n, k", [(0, 8, 9), (5, 0, 9), (5, 8, 0)])
def test_nothing_to_multiply(batch, n, k):
    index, values = groups(torch.ones(2, n, k, dtype=torch.bool, device=DEVICE)), random(2, n * k)
    x, dy, bias = random(2, batch, k), random(2, batch, n), random(2, n)
    assert torch.equal(forward(x, values, index, bias), bias[:, None].expand(2, batch, n))
    assert torch.equal(input_gradient(dy, values, index), torch.zeros(2, batch, k, device=DEVICE))
    gradient, bias_gradient = weight_gradient(dy, x, index)
    assert torch.equal(gradient, torch.zeros(2, n * k, device=DEVICE))
    torch.testing.assert_close(bias_gradient, dy.sum(1))


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(0, 36), st.integers(0, 2**20))
def test_lists_hold_every_weight_in_both_orders(tickets, n, k, nnz, seed):
    scores = torch.rand(tickets, n * k, generator=torch.Generator().manual_seed(seed))
    masks = (scores.argsort(1).argsort(1) < nnz).view(tickets, n, k)
    index = groups(masks)
    for mask, g in zip(masks, map(Groups._make, zip(*index, strict=True)), strict=True):
        assert torch.equal(torch.stack([lists(g.row_starts), g.columns.int()], 1), mask.nonzero().int())
        assert torch.equal(torch.stack([lists(g.column_starts), g.rows.int()], 1), mask.t().nonzero().int())
        assert torch.equal(mask.nonzero()[g.order], mask.t().nonzero().flip(1))
        for long, kept in ((g.long_rows, mask.sum(1)), (g.long_columns, mask.sum(0))):
            assert sorted(long.tolist()) == list(range(len(kept))) and torch.equal(kept[long], kept.msort().flip(0))


def lists(starts):
    return torch.arange(len(starts) - 1, dtype=torch.int32).repeat_interleave(starts.diff())


def test_lists_want_equally_many_weights_of_three_dimensional_masks():
    masks = torch.eye(4, dtype=torch.bool).repeat(2, 1, 1)
    masks[1, 0, 0] = False
    with pytest.raises(ValueError, match=r"equally many weights, fewer than 2\*\*31, got \[4, 3\]"):
        groups(masks)
    for wrong, got in ((masks[0], r"torch.bool \(4, 4\)"), (masks.float(), r"torch.float32 \(2, 4, 4\)")):
        with pytest.raises(ValueError, match=rf"^masks must be bool \[R, N, K\], got {got}$"):
            groups(wrong)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=(1, 4, 39)), r"^x must be \[1, 4, 40\] for these masks, got \[1, 4, 39\]$"),
        (dict(x=(2, 4, 40)), r"^x must be \[1, 4, 40\] for these masks, got \[2, 4, 40\]$"),
        (dict(x=(4, 40)), r"^x must be \[1, 40, 40\] for these masks, got \[4, 40\]$"),
        (dict(values=(1, 63)), r"^values must be \[1, 64\] for these masks, got \[1, 63\]$"),
        (dict(bias=(8,)), r"^bias must be \[1, 8\] for these masks, got \[8\]$"),
        (dict(dtype=torch.float64), r"^x must be float32, bfloat16 or float16 on .*, got torch.float64 on"),
        (dict(device="meta"), r"^x must be float32, bfloat16 or float16 on .* as the masks are, got .* on meta$"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    index = groups(make_masks("random", 1, 8, 40))
    x = random(*change.get("x", (1, 4, 40))).to(change.get("device"), change.get("dtype"))
    with pytest.raises(ValueError, match=message):
        forward(x, random(*change.get("values", (1, 64))), index, random(*change.get("bias", (1, 8))))


def test_gradients_name_what_does_not_fit():
    index = groups(make_masks("random", 1, 8, 40))
    x, dy = random(1, 4, 40), random(1, 4, 8)
    with pytest.raises(ValueError, match=r"^dy must be \[1, 4, 8\] for these masks, got \[1, 4, 9\]$"):
        input_gradient(random(1, 4, 9), random(1, 64), index)
    with pytest.raises(ValueError, match=r"^x must be \[1, 4, 40\] for these masks, got \[1, 3, 40\]$"):
        weight_gradient(dy, x[:, :3], index)
    with pytest.raises(ValueError, match="^dy and x must have one dtype, got torch.bfloat16 and torch.float32$"):
        weight_gradient(dy, x.bfloat16(), index)
