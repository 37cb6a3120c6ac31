"""Direct sparse convolution, its input gradient and its index, against float64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_oracle import DEVICE, close, random
from lth_sparse.kernels import conv_direct
from lth_sparse.kernels.conv_direct import forward, input_gradient
from lth_sparse.kernels.geometry import geometry
from lth_sparse.kernels.taps import taps
from torch.nn.functional import conv2d

MASKS = ["random", "skewed", "all", "one", "none", "empty channels"]
# Input and output channels, kernel, stride, padding, dilation, groups
LAYERS = [
    (3, 8, 3, 1, 1, 1, 1),
    (33, 5, 3, 1, 1, 1, 1),
    (64, 33, 1, 1, 0, 1, 1),
    (3, 4, 5, 2, 2, 1, 1),
    (4, 6, 3, (2, 1), (0, 1), 1, 2),
    (4, 4, 3, 2, 1, 1, 4),
    (1, 2, (1, 3), 1, 1, 2, 1),
    (2, 3, 3, 3, 2, 2, 1),
    (3, 2, 1, 2, 2, 1, 1),
]


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """The largest shape, for the interpreter runs programs one after another."""
    monkeypatch.setattr(conv_direct, "PROGRAMS", 1)


def make_mask(kind, layer):
    """Bool [Cout, Cin / groups, kh, kw]; "skewed" keeps all of one output channel and little elsewhere."""
    cin, cout, kernel, *_, groups = layer
    mask = torch.full((cout, cin // groups, *geometry(kernel).kernel), kind in ("all", "empty channels"))
    if kind in ("random", "skewed"):
        mask.view(-1)[torch.randperm(mask.numel())[: max(1, mask.numel() // (5 if kind == "random" else 20))]] = True
    if kind == "skewed":
        mask[cout // 3] = True
    if kind == "one":
        mask[cout // 2, 0, -1, 0] = True
    if kind == "empty channels":
        mask[cout // 2], mask[:, mask.shape[1] // 2] = False, False
    return mask.to(DEVICE)


class Problem:
    """A layer with operands, and what torch makes of them in float64 and in the same precision."""

    def __init__(self, layer, kind="random", batch=5, size=(7, 9), dtype=torch.float32):
        self.geometry, self.size, mask = geometry(*layer[2:]), size, make_mask(kind, layer)
        self.taps = taps(mask, self.geometry)
        self.x, self.bias = random(batch, layer[0], *size, dtype=dtype), random(layer[1], dtype=dtype, seed=1)
        self.weight = random(*mask.shape, dtype=dtype, seed=2) * mask
        self.values = self.weight.permute(0, 2, 3, 1)[mask.permute(0, 2, 3, 1)]
        self.dy = random(batch, layer[1], *self.geometry.output_size(size), dtype=dtype, seed=3)

    def torch(self, dtype=None):
        x, weight, bias, dy = (t.detach().to(dtype or self.x.dtype) for t in (self.x, self.weight, self.bias, self.dy))
        x.requires_grad_()
        _, stride, padding, dilation, groups, *_ = self.geometry
        y = conv2d(x, weight, bias, stride, padding, dilation, groups)
        return y.detach(), torch.autograd.grad(y, x, dy)[0]

    def ours(self, relu=False):
        y = forward(self.x, self.values, self.taps, self.bias, self.geometry, relu)
        return y, input_gradient(self.dy, self.values, self.taps, self.geometry, self.size)

    def is_right(self):
        return [
            ours.dtype == self.x.dtype and close(ours, wanted, theirs)
            for ours, wanted, theirs in zip(self.ours(), self.torch(torch.float64), self.torch(), strict=True)
        ]


@pytest.mark.parametrize("layer", LAYERS)
def test_equals_the_oracle_for_every_geometry(layer):
    assert all(Problem(layer).is_right())


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("layer", [LAYERS[0], LAYERS[4]])
def test_equals_the_oracle_for_every_mask(layer, kind):
    assert all(Problem(layer, kind).is_right())


@pytest.mark.parametrize("shape", conv_direct.SHAPES)
@pytest.mark.parametrize("batch, size", [(1, (7, 9)), (60, (2, 2))])
def test_equals_the_oracle_in_every_shape_of_program(monkeypatch, shape, batch, size):
    monkeypatch.setattr(conv_direct, "SHAPES", (shape,))
    assert all(Problem((3, 5, 3, 1, 1, 1, 1), batch=batch, size=size).is_right())


# The interpreter truncates to bfloat16 where a GPU rounds to the nearest.
@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.gpu)])
def test_low_precisions_err_no_more_than_torch(dtype):
    dtype = getattr(torch, dtype)
    problem = Problem(LAYERS[0], dtype=dtype)
    assert all(problem.is_right())
    problem.values, problem.bias = problem.values.float(), problem.bias.float()
    y, dx = problem.ours()
    assert y.dtype == dx.dtype == dtype and all(problem.is_right())


def test_takes_any_strides():
    problem = Problem(LAYERS[0])
    wanted = problem.ours()
    wide = random(10, 6, 9, 11)
    wide[::2, 1::2, 1:8, 1:10] = problem.x
    problem.values, problem.bias = (torch.stack([t, t], 1)[:, 0] for t in (problem.values, problem.bias))
    problem.x, problem.dy = wide[::2, 1::2, 1:8, 1:10], problem.dy.to(memory_format=torch.channels_last)
    assert all(torch.equal(ours, same) for ours, same in zip(problem.ours(), wanted, strict=True))


def test_relu_and_bias_are_fused_and_optional():
    problem = Problem(LAYERS[0])
    y, fused = problem.ours()[0], problem.ours(relu=True)[0]
    assert torch.equal(fused, y.relu()) and bool((y < 0).any())
    bare = forward(problem.x, problem.values, problem.taps, None, problem.geometry)
    assert torch.allclose(bare + problem.bias[:, None, None], y, atol=1e-6)


def test_what_is_not_finite_stays_where_it_is_read():
    """Planes shorter than their neighbours, and border positions, must not multiply an infinity by nothing."""
    problem = Problem(LAYERS[0], "skewed")
    problem.x[0, 0, 0, 0], problem.x[1, 1, 3, 3] = torch.inf, torch.nan
    kept = (problem.weight != 0).float()  # torch would multiply the zeros between them too
    clean = conv2d((~problem.x.isfinite()).float(), kept, padding=1) == 0
    y, fused = problem.ours()[0], problem.ours(relu=True)[0]
    assert torch.equal(y.isfinite(), clean) and not clean.all() and torch.equal(fused.isnan(), y.isnan())


def test_empty_batch_and_same_bits():
    problem = Problem(LAYERS[4])
    assert all(torch.equal(*runs) for runs in zip(problem.ours(), problem.ours(), strict=True))
    problem.x, problem.dy = problem.x[:0], problem.dy[:0]
    assert [t.shape for t in problem.ours()] == [t.shape for t in problem.torch()]


@given(st.sampled_from(LAYERS), st.sampled_from(MASKS), st.integers(0, 2**20))
def test_taps_list_each_weight_once_longest_plane_first(layer, kind, seed):
    torch.manual_seed(seed)
    mask, g = make_mask(kind, layer), geometry(*layer[2:])
    nnz, lists = int(mask.sum()), taps(mask, g)
    for reads, planes in ((lists.forward, layer[1]), (lists.gradient, layer[0] * g.stride[0] * g.stride[1])):
        lengths = reads.starts.diff()
        order = reads.order.int() + (reads is lists.forward) * reads.starts[:-1].repeat_interleave(lengths)
        assert all(index.dtype == torch.int32 for index in (reads.starts, reads.places, reads.by_length))
        assert len(lengths) == planes and torch.equal(order.sort()[0].cpu(), torch.arange(nnz, dtype=torch.int32))
        assert lengths.sum() == nnz and torch.equal(lengths[reads.by_length], lengths.sort(descending=True)[0])
        for start, length in zip(reads.starts, lengths, strict=False):
            assert bool((reads.places[start : start + length].diff() > 0).all())


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(4, 3, 3, dtype=torch.bool), r"^a mask of kernels \(3, 3\) is bool .*got torch.bool \(4, 3, 3\)$"),
        (torch.ones(4, 3, 3, 3), r"got torch.float32 \(4, 3, 3, 3\)$"),
        (torch.ones(4, 3, 3, 5, dtype=torch.bool), r"got torch.bool \(4, 3, 3, 5\)$"),
        (torch.ones(3, 3, 3, 3, dtype=torch.bool), "^3 output channels do not fall into 2 groups$"),
        (torch.ones(2, 2**14, 3, 3, dtype=torch.bool), "at most 32,767 channels.*got 32768 channels"),
    ],
)
def test_masks_that_cannot_be_listed_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        taps(mask, geometry(3, groups=2))


def test_windows_too_wide_to_list_are_refused():
    with pytest.raises(ValueError, match=r"windows of \(257, 257\)$"):
        taps(torch.ones(2, 2, 3, 3, dtype=torch.bool), geometry(3, dilation=128))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": random(5, 4, 7, 9)}, r"^x must be \[B, 3, 7, 9\], got \(5, 4, 7, 9\)$"),
        ({"x": random(3, 7, 9)}, r"^x must be .*got \(3, 7, 9\)$"),
        ({"x": random(5, 3, 7, 9, dtype=torch.float64)}, "one of float32, bfloat16, float16 .*got torch.float64"),
        ({"x": random(5, 3, 7, 9).to("meta")}, "^x, values and taps must be on one device, got meta"),
        ({"values": random(7)}, r"^values must be \(43,\) of the taps, got \(7,\)$"),
        ({"values": random(43).half()}, "got torch.float32 and torch.float16"),
        ({"bias": random(7)}, r"^bias must be \(8,\) on .*got \(7,\) on"),
        ({"dy": random(5, 8, 7, 8)}, r"^dy must be \[B, 8, 7, 9\], got \(5, 8, 7, 8\)$"),
        ({"size": (8, 9)}, r"^dy must be \[B, 8, 8, 9\], got \(5, 8, 7, 9\)$"),
        ({"geometry": geometry(3, 1, 1, 2)}, "^the taps were made for Geometry.*, not for Geometry"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    problem = Problem(LAYERS[0])
    vars(problem).update(change)
    with pytest.raises(ValueError, match=message):
        problem.ours()
