"""One program per ticket, many steps a launch: against torch's autograd and Adam in float64, on the masked network."""

import functools
import itertools
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from kernel_oracle import DEVICE, MASKS, make_masks, packed, random
from lth_sparse.kernels.groups import Groups, groups
from lth_sparse.kernels.ticket_trainer import Layer, fits, train

SIZES = (20, 12, 7, 5)
SCALE, SHIFT = 1 / 128, -0.75
BETAS = tuple(float(np.float32(beta)) for beta in (0.9, 0.999))  # float32 is what the moments decay by
TOLERANCE = 2e-6  # of the largest entry; 3e-7 is what 25 steps of a batch of 60 come to


class Problem(NamedTuple):
    """Perceptrons and the batches they train on."""

    layers: list[Layer]
    masks: list[torch.Tensor]
    images: torch.Tensor
    labels: torch.Tensor
    indices: torch.Tensor
    lr: torch.Tensor
    loss: torch.Tensor


def problem(kind="random", sizes=SIZES, tickets=1, batch=8, steps=4):
    """R tickets of that kind of masks, each with weights and batches of its own; 0.15 s to train one for a step."""
    torch.manual_seed(0)
    masks = [make_masks(kind, tickets, n, k) for k, n in zip(sizes, sizes[1:], strict=False)]
    layers = []
    for seed, mask in enumerate(masks):
        values, bias = packed(random(*mask.shape, seed=seed) * mask, mask), random(*mask.shape[:2], seed=seed + 100)
        moments = [torch.zeros_like(tensor) for tensor in (values, values, bias, bias)]
        layers.append(Layer(values, *moments[:2], bias, *moments[2:], groups(mask)))
    return Problem(
        layers,
        masks,
        torch.randint(256, (50, sizes[0]), dtype=torch.uint8).to(DEVICE),
        torch.randint(sizes[-1], (50,)).to(DEVICE),
        torch.randint(50, (steps, tickets, batch)).to(DEVICE),
        torch.linspace(0.01, 0.02, steps, device=DEVICE),
        torch.zeros(tickets, device=DEVICE),
    )


def run(given, count=0, **options):
    train(given.images, given.labels, given.indices, SCALE, SHIFT, given.layers, count, given.lr, given.loss, **options)
    return given


def part(given, tickets=slice(None), steps=slice(None)):
    """Some of the tickets, for some of the steps, in the memory of `given`."""
    layers = [
        Layer(*(t[tickets] for t in layer[:6]), Groups(*(t[tickets] for t in layer[6]))) for layer in given.layers
    ]
    masks = [mask[tickets] for mask in given.masks]
    indices = given.indices[steps, tickets].contiguous()
    return Problem(layers, masks, given.images, given.labels, indices, given.lr[steps], given.loss[tickets])


def state(given):
    """All that training changes."""
    return [given.loss, *(tensor for layer in given.layers for tensor in layer[:6])]


def same(one, other):
    return all(map(torch.equal, state(one), state(other)))


def wanted(given, ticket, betas=BETAS, **options):
    """What `state` of one ticket should be after training: of dense weights, in float64 on the CPU."""
    masks = [mask[ticket].cpu() for mask in given.masks]
    dense = [torch.zeros(mask.shape, dtype=torch.float64) for mask in masks]
    weights, biases = [], []
    for weight, mask, layer in zip(dense, masks, given.layers, strict=True):
        weights.append(weight.masked_scatter_(mask, layer.values[ticket].cpu().double()).requires_grad_())
        biases.append(layer.bias[ticket].cpu().double().requires_grad_())
    optimizer, total = torch.optim.Adam([*weights, *biases], betas=betas, **options), 0
    for indices, lr in zip(given.indices[:, ticket].cpu(), given.lr, strict=True):
        optimizer.param_groups[0]["lr"] = float(lr)
        optimizer.zero_grad()
        loss = mean_loss(given, indices, [w * m for w, m in zip(weights, masks, strict=True)], biases)
        loss.backward()
        optimizer.step()
        total += loss.detach()
    found = [total]
    for weight, bias, mask in zip(weights, biases, masks, strict=True):
        for each, kept in ((weight, mask), (bias, slice(None))):
            moments = optimizer.state[each]
            found += [t.detach()[kept] for t in (each, moments["exp_avg"], moments["exp_avg_sq"])]
    return found


def mean_loss(given, indices, weights, biases):
    x = given.images.cpu()[indices].double() * SCALE + SHIFT
    for depth, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        x = F.linear(x.relu() if depth else x, weight, bias)
    return F.cross_entropy(x, given.labels.cpu()[indices])


def near(ours, theirs):
    error = (ours.cpu().double() - theirs).abs()
    return ours.shape == theirs.shape and (not len(error.view(-1)) or error.max() <= TOLERANCE * theirs.abs().max())


def trains(given, **options):
    """Whether every ticket of `given` comes to what torch comes to."""
    oracle = [wanted(given, ticket, **options) for ticket in range(len(given.loss))]
    run(given, **options)
    ours = [[tensor[ticket] for tensor in state(given)] for ticket in range(len(given.loss))]
    return all(
        near(*pair) for mine, theirs in zip(ours, oracle, strict=True) for pair in zip(mine, theirs, strict=True)
    )


@functools.cache
def group():
    """Three tickets after two steps of one launch."""
    return run(problem(tickets=3, steps=2))


@pytest.mark.parametrize("kind", MASKS)
def test_trains_as_torch_does(kind):
    assert trains(problem(kind, batch=13, steps=2))


@pytest.mark.parametrize("batch", [1, 60, 70])
def test_any_batch(batch):
    assert trains(problem(batch=batch, steps=1))


@pytest.mark.parametrize("sizes", [(16, 3), (9, 70, 2), (5, 6, 7, 8, 17)])
def test_any_depth_and_width(sizes):
    assert trains(problem(sizes=sizes, steps=2))


def test_options_of_adam():
    assert trains(problem("all", steps=3), betas=(0.0, 0.5), eps=1e-3, weight_decay=0.1)


def test_a_group_trains_as_torch_does_and_on_different_numbers():
    assert trains(problem(tickets=3, steps=2))
    assert len({tuple(values.tolist()) for values in group().layers[0].values}) == 3


def test_same_bits_again_however_the_steps_are_launched():
    runs = []
    for launches in ([4], [4], [1, 1, 1, 1], [1, 3]):
        runs.append(problem())
        for count, until in itertools.pairwise([0, *itertools.accumulate(launches)]):
            run(part(runs[-1], steps=slice(count, until)), count)
    assert all(same(runs[0], other) for other in runs[1:]) and not same(runs[0], problem())


def test_a_ticket_alone_has_the_same_bits_and_leaves_others_as_they_were():
    given, untouched = (problem(tickets=3, steps=2) for _ in range(2))
    run(part(given, slice(1, 2)))
    assert same(part(given, slice(1, 2)), part(group(), slice(1, 2)))
    for rest in (slice(0, 1), slice(2, 3)):
        assert same(part(given, rest), part(untouched, rest))


def test_data_and_masks_are_only_read_and_nothing_comes_to_exist_off_the_masks():
    fresh = problem(tickets=3, steps=2)
    for now, before in zip(group().layers, fresh.layers, strict=True):
        assert all(map(torch.equal, now.groups, before.groups)) and now.values.shape == before.values.shape
    assert all(map(torch.equal, group()[2:6], fresh[2:6]))


def test_no_step_changes_nothing():
    given = part(problem(tickets=2), steps=slice(0, 0))
    assert same(run(given), problem(tickets=2))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy's, of the interpreter
def test_what_diverges_is_not_a_number_and_keeps_to_itself():
    given = problem(tickets=3, steps=2)
    given.layers[1].values[0, 0] = torch.inf
    run(given)
    assert not given.loss[0].isfinite()
    assert same(part(given, slice(1, 3)), part(group(), slice(1, 3)))


def lenet(kept):
    """Layers of LeNet-300-100 without memory."""
    layers = []
    for (n, k), nnz in zip([(300, 784), (100, 300), (10, 100)], kept, strict=True):
        sizes = n + 1, nnz, n, k + 1, nnz, k, nnz
        tensors = [torch.empty(2, size, device="meta") for size in (nnz, nnz, nnz, n, n, n, *sizes)]
        layers.append(Layer(*tensors[:6], Groups(*tensors[6:])))
    return layers


def test_what_fits_a_multiprocessor():
    assert fits(lenet((11_733, 1_467, 100)), 60)  # 5%
    assert not fits(lenet((23_520, 3_000, 200)), 60)  # 10%: the moments of the first layer
    assert not fits(lenet((11_733, 1_467, 100)), 128)  # 353 kB of activations around the first layer
    assert fits(lenet((11_733, 1_467, 100)), 128, 2**20) and not fits(lenet((1, 1, 1)), 129, 2**30)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(images=torch.zeros(50, 20)), r"^images must be uint8 \(50, 20\), contiguous, on .*, got float32"),
        (dict(images=torch.zeros(50, 4, 5)), r"^training takes layers, images \[n, P\] and .*\(50, 4, 5\) and"),
        (
            dict(images=torch.zeros(50, 21).byte()),
            r"^column_starts of layer 0 must be int32 \(1, 22\), .*, got .* \(1, 21\)",
        ),
        (dict(labels=torch.zeros(49).long()), r"^labels must be int64 \(50,\), .*, got int64 \(49,\)"),
        (dict(indices=torch.zeros(1, 1, 129).long()), r"1 to 128\], got 3 layers, .* and \(1, 1, 129\)$"),
        (dict(indices=torch.zeros(4, 2, 8).long()), r"^loss_sum must be float32 \(2,\)"),
        (dict(lr=torch.zeros(3)), r"^lr must be float32 \(4,\), .* got float32 \(3,\)"),
        (dict(lr=torch.zeros(8)[::2]), r"^lr must be .*, got non-contiguous float32 \(4,\)"),
        (dict(loss=torch.zeros(1).double()), r"^loss_sum must be float32 \(1,\), .*, got float64"),
        (dict(layers=[]), r"got 0 layers, "),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    change = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=message):
        run(problem()._replace(**change))


@pytest.mark.parametrize(
    "field, wrong, message",
    [
        (
            "values_second",
            random(1, 5),
            r"^values_second of layer 1 must be float32 \(1, 16\), .* got float32 \(1, 5\)",
        ),
        ("bias", random(1, 8), r"^bias_first of layer 1 must be float32 \(1, 8\)"),
        ("bias_first", random(1, 7).half(), r"^bias_first of layer 1 must be float32 \(1, 7\), .* got float16"),
    ],
)
def test_layers_that_do_not_fit_are_named(field, wrong, message):
    given = problem()
    layers = [given.layers[0], given.layers[1]._replace(**{field: wrong}), given.layers[2]]
    with pytest.raises(ValueError, match=message):
        run(given._replace(layers=layers))


def test_wide_outputs_are_refused():
    with pytest.raises(ValueError, match=r"^the last layer must have at most 128 outputs, got 129$"):
        run(problem(sizes=(4, 129)))
