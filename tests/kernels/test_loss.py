"""Cross-entropy, its gradient and the tally of an evaluation, against torch in float64."""

import pytest
import torch
import torch.nn.functional as F
from kernel_oracle import DEVICE, close, random
from lth_sparse.kernels.loss import BLOCK, cross_entropy, tally

# Tickets, batch and classes; tiles of one row and of many, and batches that no tile divides.
SHAPES = [
    (3, 60, 10),
    (1, 1, 3),
    (2, 257, 3),
    (1, 257, 10),
    (3, 7, 1000),
    (1, 2, 1024),
    (2, 5, 1),
    (1, BLOCK // 16, 16),
]
every_shape = pytest.mark.parametrize("shape", SHAPES)


def operands(tickets, batch, classes, dtype=torch.float32):
    """Logits, the labels of a data set, and which of them each ticket's batch has."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (500,), generator=generator)
    indices = torch.randint(500, (tickets, batch), generator=generator)
    labels[0], labels[499], indices[0, 0], indices[-1, -1] = 0, classes - 1, 499, 0
    return 3 * random(tickets, batch, classes, dtype=dtype), labels.to(DEVICE), indices.to(DEVICE)


def torchs(logits, labels):
    """Mean loss [R] of labels [R, B], and its gradient."""
    logits = logits.detach().clone().requires_grad_()
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape).mean(1)
    losses.sum().backward()
    return losses.detach(), logits.grad


@every_shape
def test_gradient_and_mean_loss_equal_the_oracle(shape):
    logits, labels, indices = operands(*shape)
    loss_sum = random(shape[0], seed=1)
    before, gradient = loss_sum.clone(), cross_entropy(logits, labels, indices, loss_sum)
    loss, wanted = torchs(logits.double(), labels[indices])
    theirs = torchs(logits, labels[indices])
    assert gradient.dtype == torch.float32
    assert close(gradient, wanted, theirs[1]) and close(loss_sum, before + loss, before + theirs[0])


@every_shape
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_tally_equals_the_oracle(shape, dtype):
    logits, _, _ = operands(*shape)
    labels = torch.randint(shape[2], (shape[1],), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    sums = random(shape[0], 2, seed=1).round().to(dtype)
    before = sums.to(torch.float64, copy=True)
    tally(logits, labels, sums)
    loss, theirs = (torchs(kind, labels.expand(shape[:2]))[0] * shape[1] for kind in (logits.double(), logits))
    assert close(sums[:, 0], before[:, 0] + loss, before[:, 0] + theirs)
    assert torch.equal(sums[:, 1].double(), before[:, 1] + (logits.argmax(2) == labels).sum(1))


def test_the_first_of_equal_logits_is_the_prediction():
    logits = torch.zeros(1, 4, 10, device=DEVICE)
    logits[0, 1, 3], logits[0, 1, 7] = 5.0, 5.0
    logits[0, 2], logits[0, 3, 9] = -torch.inf, 1.0
    logits[0, 2, 5:] = -2.0
    for labels, correct in (([0, 3, 5, 9], 4), ([1, 7, 6, 0], 0), ([9, 3, 9, 9], 2)):
        sums = torch.zeros(1, 2, dtype=torch.float64, device=DEVICE)
        tally(logits, torch.tensor(labels, device=DEVICE), sums)
        assert sums[0, 1] == correct


def test_sums_add_up_over_batches():
    logits, labels, _ = operands(2, 300, 10)
    sums, at_once = torch.zeros(2, 2, 2, dtype=torch.float64, device=DEVICE)
    for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
        tally(logits[:, part], labels[:300][part], sums)
    tally(logits, labels[:300], at_once)
    assert torch.equal(sums[:, 1], at_once[:, 1])
    assert torch.allclose(sums, at_once, rtol=1e-6)


def test_large_logits_neither_overflow_nor_underflow():
    logits = torch.tensor([[[1e4, 0.0, -1e4], [-3e38, -3e38, -3e38], [0.0, 88.0, 120.0]]], device=DEVICE)
    labels, loss_sum = torch.tensor([0, 1, 1], device=DEVICE), torch.zeros(1, device=DEVICE)
    gradient = cross_entropy(logits, labels, torch.arange(3, device=DEVICE)[None], loss_sum)
    loss, wanted = torchs(logits.double(), labels[None])
    assert close(gradient, wanted, wanted) and close(loss_sum, loss, loss)


# the interpreter cuts bits off where it should round to bfloat16 (Triton 3.9)
@pytest.mark.parametrize("dtype", [pytest.param(torch.bfloat16, marks=pytest.mark.gpu), torch.float16])
def test_low_precisions_are_computed_in_float32(dtype):
    logits, labels, indices = operands(2, 60, 10, dtype)
    sums, wide = torch.zeros(2, 2, device=DEVICE)
    gradient = cross_entropy(logits, labels, indices, sums)
    assert gradient.dtype == dtype
    assert torch.equal(gradient, cross_entropy(logits.float(), labels, indices, wide).to(dtype))
    assert torch.equal(sums, wide)


def test_the_loss_of_nan_is_nan():
    logits, labels, indices = operands(2, 60, 10)
    logits[0, 3, 4] = torch.nan
    loss_sum = torch.zeros(2, device=DEVICE)
    gradient = cross_entropy(logits, labels, indices, loss_sum)
    assert loss_sum[0].isnan() and gradient[0, 3].isnan().all()
    assert not loss_sum[1].isnan() and gradient.isnan().sum() == 10
    sums = torch.zeros(2, 2, device=DEVICE)
    tally(logits, labels[:60], sums)
    assert sums[0, 0].isnan() and not sums[1].isnan().any()


def test_takes_any_strides():
    logits, labels, indices = operands(2, 30, 10)
    turned, slanted = logits.mT.contiguous().mT, indices.t().contiguous().t()
    sums, again = torch.zeros(2, 2, device=DEVICE)
    wanted = cross_entropy(logits, labels, indices, sums)
    assert torch.equal(cross_entropy(turned, labels.repeat_interleave(2)[::2], slanted, again), wanted)
    assert torch.equal(sums, again)


def test_empty_batches_change_nothing():
    loss_sum, sums = torch.ones(2, device=DEVICE), torch.ones(2, 2, device=DEVICE)
    logits, labels, indices = operands(2, 4, 10)
    assert cross_entropy(logits[:, :0], labels, indices[:, :0], loss_sum).shape == (2, 0, 10)
    tally(logits[:, :0], labels[:0], sums)
    assert (loss_sum == 1).all() and (sums == 1).all()


def test_same_inputs_same_bits():
    logits, labels, indices = operands(2, 257, 10)
    runs = []
    for _ in range(2):
        loss_sum, sums = torch.zeros(2, device=DEVICE), torch.zeros(2, 2, device=DEVICE)
        tally(logits, labels[:257], sums)
        runs.append((cross_entropy(logits, labels, indices, loss_sum), loss_sum, sums))
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(logits=(2, 4, 1025)), r"logits must be of .*, C at most 1024, got torch.float32 \(2, 4, 1025\)"),
        (dict(logits=(4, 10)), r"got torch.float32 \(4, 10\)"),
        (dict(labels=(2, 9)), r"labels must be int64 \[n\] on .*, got torch.int64 \(2, 9\)"),
        (dict(indices=(2, 5)), r"indices must be int64 \(2, 4\) on .*, got torch.int64 \(2, 5\)"),
        (dict(loss_sum=(1,)), r"the sums must be float32 \(2,\), contiguous, on .*, got torch.float32 \(1,\)"),
    ],
)
def test_shapes_that_do_not_fit_are_named(change, message):
    shapes = {"logits": (2, 4, 10), "labels": (9,), "indices": (2, 4), "loss_sum": (2,)} | change
    tensors = {name: random(*shape) for name, shape in shapes.items()}
    tensors |= {name: tensors[name].long() for name in ("labels", "indices")}
    with pytest.raises(ValueError, match=message):
        cross_entropy(**tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(labels=lambda t: t[:3]), r"labels must be \[B\] of logits \(2, 4, 10\), got \(3,\)"),
        (dict(sums=lambda t: t.long()), r"the sums must be float64 or float32 \(2, 2\), .*, got torch.int64"),
        (dict(sums=lambda t: t.t()), r"got torch.float32 \(2, 2\) of strides \(1, 2\)"),
        (dict(logits=lambda t: t.double()), r"logits must be of float32, bfloat16, float16 .*, got torch.float64"),
        (dict(labels=lambda t: t.int()), r"labels must be int64"),
        (dict(labels=lambda t: t.to("meta")), r"labels must be int64 \[n\] on .*, got torch.int64 \(4,\) on meta"),
    ],
)
def test_what_cannot_be_tallied_is_named(change, message):
    tensors = {"logits": random(2, 4, 10), "labels": random(4).long(), "sums": random(2, 2)}
    with pytest.raises(ValueError, match=message):
        tally(**{name: change.get(name, lambda t: t)(tensor) for name, tensor in tensors.items()})
