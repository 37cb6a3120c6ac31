"""Adam, AdamW and SGD over a table of tensors, against torch's own in float64."""

import pytest
import torch
from kernel_oracle import DEVICE, MASKS, close, make_masks, packed, random
from lth_sparse.kernels.optimizer import adam_, kept_positions, sgd_
from lth_sparse.kernels.pattern import bitmap
from lth_sparse.kernels.table import ALIGNED, BLOCK, Update, table
from torch import optim

SIZES = [(2 * BLOCK - 1,), (0,), (1,), (7, 3), (BLOCK,)]
LR = 1e-2
KINDS = {
    "adam": (optim.Adam, {}),
    "adam with decay": (optim.Adam, dict(weight_decay=0.1, betas=(0.0, 0.95), eps=1e-3)),
    "adamw": (optim.AdamW, dict(weight_decay=0.1)),
    "sgd": (optim.SGD, dict(weight_decay=0.1)),
    "momentum": (optim.SGD, dict(momentum=0.9, weight_decay=0.1)),
    "nesterov": (optim.SGD, dict(momentum=0.9, nesterov=True)),
}
every_kind = pytest.mark.parametrize("kind, options", KINDS.values(), ids=KINDS)


def tensors(sizes=SIZES, seed=0):
    return [random(*size, seed=seed + at) for at, size in enumerate(sizes)]


def update(value, shadow=None, kept=None):
    moments = [torch.zeros_like(value), torch.zeros_like(value), torch.zeros((), device=value.device)]
    return Update(value, torch.zeros_like(value), *moments, shadow, kept)


def step(rows, kind, options, lr=LR):
    if kind is optim.SGD:
        sgd_(rows, lr, **options)
    else:
        adam_(rows, lr, **options, decoupled=kind is optim.AdamW)


def train(kind, options, updates, steps=20, lr=LR):
    """What the kernels make of `updates`; gradient s of tensor t is random with a seed of its own."""
    rows = table(updates)
    for seed in range(steps):
        for each, gradient in zip(updates, tensors([u.value.shape for u in updates], 100 * (seed + 1)), strict=True):
            each.gradient.copy_(gradient)
        step(rows, kind, options, lr)
    return [each.value for each in updates]


def torchs(kind, options, values, dtype, steps=20):
    values = [value.to(dtype).clone().requires_grad_() for value in values]
    optimizer = kind(values, lr=LR, **options)
    for seed in range(steps):
        for value, gradient in zip(values, tensors([v.shape for v in values], 100 * (seed + 1)), strict=True):
            value.grad = gradient.to(dtype)
        optimizer.step()
    return [value.detach() for value in values]


@pytest.mark.parametrize("steps", [1, 20])
@every_kind
def test_errs_no_more_than_torch(kind, options, steps):
    starts = tensors()
    updates = [update(start.clone()) for start in starts]
    ours = train(kind, options, updates, steps)
    wanted, theirs = (torchs(kind, options, starts, dtype, steps) for dtype in (torch.float64, torch.float32))
    assert close(*(torch.cat([value.flatten() for value in values]) for values in (ours, wanted, theirs)))
    assert all((our != start).all() for our, start in zip(ours, starts, strict=True))
    assert {u.step.item() for u in updates} == ({0.0} if kind is optim.SGD else {float(steps)})


def test_bias_corrections_of_the_first_steps_are_exact():
    """Of a constant gradient the moments, corrected, are it and its square: every step is the learning rate."""
    for count in (1, 2, 3, 10, 100, 1000, 10**5):
        each = update(torch.zeros(5, device=DEVICE))
        each.gradient.fill_(0.5)
        decays = torch.tensor([0.9, 0.999], dtype=torch.float32).double()  # what the moments decay by
        each.first.fill_(0.5 * (1 - decays[0] ** (count - 1)))
        each.second.fill_(0.25 * (1 - decays[1] ** (count - 1)))
        each.step.fill_(count - 1)
        adam_(table([each]), 1.0, eps=1e-30)
        assert (each.value + 1).abs().max() <= 1e-6 and each.step.item() == count


def test_each_tensor_counts_its_own_steps():
    early, late = (update(random(9)) for _ in range(2))
    train(optim.Adam, {}, [late], 3)
    alone = update(random(9))
    step(table([early, late]), optim.Adam, {})
    step(table([alone]), optim.Adam, {})
    assert (early.step.item(), late.step.item()) == (1, 4)
    assert torch.equal(early.value, alone.value)


@every_kind
def test_tensors_at_any_address_get_the_same_bits_and_their_neighbours_stay(kind, options):
    size, aligned = 2 * BLOCK + 5, update(random(2 * BLOCK + 5))
    memory = [torch.full((size + 2,), 7.0, device=DEVICE) for _ in range(4)]
    views = [m[1:-1] for m in memory]
    assert all(view.data_ptr() % 16 for view in views)
    odd = Update(*views, torch.zeros((), device=DEVICE))
    for view, tensor in zip(views, aligned, strict=False):
        view.copy_(tensor)
    assert [table([each]).cells[1 + ALIGNED.value] for each in (aligned, odd)] == [size, 0]
    for each in (aligned, odd):
        train(kind, options, [each], 3)
    assert torch.equal(odd.value, aligned.value) and torch.equal(odd.first, aligned.first)
    assert all((m[[0, -1]] == 7).all() for m in memory)


def test_dense_tensors_in_another_order_are_stepped_as_they_lie():
    plain, last = (update(random(6, 5, 3, 3)) for _ in range(2))
    last = Update(*(t.to(memory_format=torch.channels_last) for t in last[:4]), last.step)
    for each in (plain, last):
        train(optim.Adam, {}, [each], 3)
    assert torch.equal(plain.value, last.value) and last.value.stride() != plain.value.stride()


def rounded(values):
    """To bfloat16; the interpreter cuts the lower bits off instead."""
    return values if DEVICE == "cuda" else values.view(torch.int32).bitwise_and(-(2**16)).view(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tickets, n, k", [(1, 40, 64), (3, 17, 33), (1, 1, 1)])
@pytest.mark.parametrize("kind", MASKS)
def test_shadows_hold_the_values(kind, tickets, n, k, dtype):
    masks, dense = make_masks(kind, tickets, n, k), random(tickets, n, k)
    shadow = torch.where(masks, dense, 0).to(dtype)
    kept = kept_positions(bitmap(masks).words, k)
    assert kept.dtype == torch.int32 and torch.equal(kept.long(), masks.flatten().nonzero().flatten())
    updates = [update(packed(dense, masks).flatten(), shadow, kept), update(random(5))]
    before = shadow.clone()
    for optimizer, options in (KINDS["adamw"], KINDS["nesterov"]):
        train(optimizer, options, updates, 1)
        wanted = torch.zeros(masks.shape, device=DEVICE).masked_scatter(masks, updates[0].value)
        assert torch.equal(shadow, wanted if dtype == torch.float32 else rounded(wanted).to(dtype))
    assert not masks.any() or not torch.equal(shadow, before)


@every_kind
def test_same_inputs_same_bits(kind, options):
    runs = [train(kind, options, [update(value) for value in tensors()], 2) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(*runs, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "nesterov"])
def test_the_learning_rate_may_be_a_tensor_that_is_written_between_steps(kind):
    by_number, by_tensor, on_cpu = (update(random(40)) for _ in range(3))
    lr = torch.tensor(LR, device=DEVICE)
    for factor in (1.0, 0.5, 0.1):
        lr.fill_(LR * factor)
        train(*KINDS[kind], [by_number], 1, LR * factor)
        train(*KINDS[kind], [by_tensor], 1, lr)
        train(*KINDS[kind], [on_cpu], 1, torch.tensor([LR * factor], dtype=torch.float64))
    assert torch.equal(by_number.value, by_tensor.value) and torch.equal(by_number.value, on_cpu.value)


def good():
    mask = torch.ones(1, 4, 6, dtype=torch.bool, device=DEVICE)
    return update(random(24), torch.zeros(4, 6, device=DEVICE), kept_positions(bitmap(mask).words, 6))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda u: dict(value=random(24, dtype=torch.float64)), "an update is float32.*got float64"),
        (lambda u: dict(gradient=u.gradient.bfloat16()), "an update is float32.*bfloat16"),
        (lambda u: dict(gradient=random(23)), "alike in memory, got.*23"),
        (lambda u: dict(gradient=random(48)[::2]), "alike in memory"),
        (lambda u: dict(gradient=u.gradient.to_sparse()), "alike in memory"),
        (lambda u: {name: random(48)[::2] for name in Update._fields[:4]}, "must be dense"),
        (lambda u: dict(second=random(1).expand(24)), "alike in memory"),
        (lambda u: dict(step=torch.zeros(2)), "step of one entry"),
        (lambda u: dict(step=torch.zeros((), device="meta")), "on meta"),
        (lambda u: dict(shadow=u.shadow.half()), "float16"),
        (lambda u: dict(shadow=torch.zeros(6, 4, device=DEVICE).t()), "a shadow is contiguous"),
        (lambda u: dict(kept=u.kept[1:]), r"a place for each value, got .*int32 \(23,\)"),
        (lambda u: dict(kept=u.kept.long()), "int64"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    table([good()])
    with pytest.raises(ValueError, match=message):
        table([good()._replace(**change(good()))])


def test_a_table_is_of_one_device():
    meta = Update(*(None if t is None else t.to("meta") for t in good()))
    for updates in ([], [good(), meta]):
        with pytest.raises(ValueError, match="tensors on one device, got [02] on"):
            table(updates)


@pytest.mark.parametrize("missing", ["first", "second", "step"])
def test_moments_and_steps_that_a_kernel_would_read_are_wanted(missing):
    updates = [good(), good()._replace(**{missing: None})]
    lacking = table(updates)
    with pytest.raises(ValueError, match=f"needs first, second, step, got one without {missing}"):
        adam_(lacking, LR)
    sgd_(lacking, LR)
    assert not any(each.step for each in updates if each.step is not None)
    if missing == "first":
        with pytest.raises(ValueError, match="needs first, got one without first"):
            sgd_(lacking, LR, momentum=0.9)


@pytest.mark.gpu
@every_kind
def test_a_graph_replays_steps(kind, options):
    """Many blocks at once also show whether a step is ever counted before another block has read it."""
    eager, graphed = ([update(random(size)) for size in (2**22 + 1, 5)] for _ in range(2))
    lr, count = torch.tensor(LR, device=DEVICE), 50
    for updates in (eager, graphed):
        for each in updates:
            each.gradient.fill_(1.0)
    rows = table(graphed)
    step(rows, kind, options, lr)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(rows, kind, options, lr)
    for _ in range(count - 1):
        graph.replay()
    for _ in range(count):
        step(table(eager), kind, options, lr)
    assert all(torch.equal(a.value, b.value) for a, b in zip(eager, graphed, strict=True))
    assert {u.step.item() for u in graphed} == ({0.0} if kind is optim.SGD else {float(count)})
    for each, start in zip(graphed, [random(2**22 + 1), random(5)], strict=True):
        references = [start.to(dtype).requires_grad_() for dtype in (torch.float64, torch.float32)]
        for value in references:
            optimizer, value.grad = kind([value], lr=LR, **options), torch.ones_like(value)
            for _ in range(count):
                optimizer.step()
        assert close(each.value, *(value.detach() for value in references))
