"""Supermasks: accuracy untrained, masks learned by the straight-through estimator, dynamic weight rescaling."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lth_sparse as lth
from lth_sparse import actions, models, supermask
from lth_sparse.data import Data, Split
from lth_sparse.masks import get_masks, set_masks_
from lth_sparse.training.order import Order

W = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.0]])
MASK = torch.tensor([[True, False, False], [False, True, True]])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny(size=60, classes=3, shape=(1, 4, 4)) -> Data:
    """Random images, labelled by the brightest of their first pixels."""

    def split(count, seed):
        images = torch.rand(count, *shape, generator=seeded(seed))
        return Split(images, images.flatten(1)[:, :classes].argmax(1))

    return Data("tiny", split(size, 0), split(150, 1), split(200, 2), shape, classes, "unit")


def linear(weight=W, bias=(0.0, 0.25)):
    """A masked network of one layer, 3 inputs (1x1x3 images) and 2 classes."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    with torch.no_grad():
        model[1].weight.copy_(weight)
        model[1].bias.copy_(torch.tensor(bias))
    return lth.sparsify_(model)


def perceptron(seed=0):
    torch.manual_seed(seed)
    return lth.sparsify_(nn.Sequential(nn.Flatten(), nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 3)))


def accuracy(logits, labels):
    return (logits.argmax(1) == labels).double().mean().item()


def state(model):
    return {name: tensor.tolist() for name, tensor in model.state_dict().items()}


IMAGES = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.5, 0.0, 1.0], [1.0, 0.0, 0.0], [0.2, 0.0, 0.0]])
LABELS = torch.tensor([1, 0, 1, 0, 0])


def rows(images=IMAGES, labels=LABELS) -> Data:
    """The same images of 1x1x3 everywhere; validation lacks the last."""
    split = Split(images.view(-1, 1, 1, 3), labels)
    return Data("rows", split, Split(*(part[:-1] for part in split)), split, (1, 1, 3), 2, "unit")


@pytest.mark.parametrize("scale", [1, 2])
def test_untrained_accuracy_is_that_of_the_start_under_the_masks(scale):
    """Six weights, three of them kept: rescaled, each counts twice beside the bias."""
    model = linear()
    start = lth.snapshot(model)
    with torch.no_grad():
        model[1].weight.mul_(-1)  # trained since, and pruned otherwise
    before = state(lth.prune_(model, 0.5))
    logits = IMAGES @ (scale * torch.tensor([[1.0, 0.0, 0.0], [0.0, 4.0, -1.0]])).T + torch.tensor([0.0, 0.25])
    found = supermask.untrained_accuracy(model, start, {"1": MASK}, rows(), rescale=scale == 2)
    assert logits.argmax(1).tolist() == [1, 1, 0, 0, 2 - scale]
    assert found == {"validation": accuracy(logits[:-1], LABELS[:-1]), "test": accuracy(logits, LABELS)}
    assert state(model) == before


def test_the_action_and_its_seed_decide_the_values():
    model, data = perceptron(), tiny()
    start, masks = lth.snapshot(model), get_masks(lth.prune_(model, 0.5))

    def by_hand(action, seed):
        network = copy.deepcopy(model)
        set_masks_(network, masks)
        actions.KEPT[action](network, start, seeded(seed))
        return {name: accuracy(network(split.images), split.labels) for name, split in splits.items()}

    splits = {"validation": data.validation, "test": data.test}
    found = [supermask.untrained_accuracy(model, start, masks, data, action, seed=seed) for action, seed in CASES]
    assert found == [by_hand(*case) for case in CASES]
    assert len({str(accuracies) for accuracies in found}) == len(CASES)


CASES = [("rewind", 0), ("constant-sign", 0), ("reinit", 0), ("reinit", 1)]


def test_signed_constants_give_the_accuracy_of_the_signs():
    """One layer without bias: the constant itself moves no argmax."""
    model = linear(bias=(0.0, 0.0))
    logits = IMAGES @ (W.sign() * MASK).T
    found = supermask.untrained_accuracy(model, lth.snapshot(model), {"1": MASK}, rows(), "constant-sign")
    assert found["test"] == accuracy(logits, LABELS) != accuracy(IMAGES @ (W * MASK).T, LABELS)


def test_an_unknown_action_and_a_packed_model_are_refused():
    model = perceptron()
    start, masks = lth.snapshot(model), get_masks(model)
    with pytest.raises(ValueError, match="^unknown action 'grow': choose from rewind, "):
        supermask.untrained_accuracy(model, start, masks, tiny(), "grow")
    lth.pack_(lth.prune_(model, 0.9), strategies={"1": "dense", "3": "dense"})
    for call in (lambda: supermask.untrained_accuracy(model, start, masks, tiny()), lambda: learn(model)):
        with pytest.raises(ValueError, match="but '1' is packed: call unpack_"):
            call()


def learn(model=None, data=None, iterations=6, **settings):
    settings = dict(batch_size=20, evaluate_every=4, samples=2) | settings
    return supermask.learn(model or perceptron(), data or tiny(), iterations, **settings)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(iterations=0), "^iterations must be 1 or more, got 0$"),
        (dict(evaluate_every=0), "^evaluate_every must be 1 or more, got 0$"),
        (dict(samples=0), "^samples must be 1 or more, got 0$"),
        (dict(batch_size=0), "^batch_size must lie between 1 and the 60 training images, got 0$"),
        (dict(batch_size=61), "^batch_size must lie between 1 and the 60 training images, got 61$"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        learn(**settings)


def test_a_dense_model_is_refused():
    with pytest.raises(ValueError, match="no masked layers"):
        learn(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)))


def test_draws_come_as_often_as_their_probability():
    """Within 4.5 standard deviations of a binomial law; 0 and 1 are certain."""
    count = 20_000
    for p in (0.0, 0.03, 0.5, 0.9, 1.0):
        drawn = supermask._straight_through(torch.full((count,), p), seeded(3))
        assert drawn.unique().tolist() == ([0, 1] if 0 < p < 1 else [p])
        assert abs(drawn.sum().item() - count * p) <= 4.5 * math.sqrt(count * p * (1 - p))
    drawn = torch.stack(
        [supermask._straight_through(torch.full((2,), 0.5), generator) for generator in [seeded(5)] * 4000]
    )
    agree = (drawn[:, 0] == drawn[:, 1]).sum().item()
    assert abs(agree - 2000) <= 4.5 * math.sqrt(1000)  # independent of each other


def test_the_gradient_passes_the_draw():
    scores = torch.tensor([[-torch.inf, -1.0, 0.0], [0.5, 2.0, torch.inf]], requires_grad=True)
    slopes = torch.tensor([[1.0, -3.0, 0.5], [2.0, 0.25, 4.0]])
    mask = supermask._straight_through(scores.sigmoid(), seeded())
    (slopes * W * mask).sum().backward()
    p = torch.tensor([[0.0, 0.26894143, 0.5], [0.62245935, 0.88079709, 1.0]])
    torch.testing.assert_close(scores.grad, slopes * W * p * (1 - p))
    assert set(mask.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("rescale", [False, True])
def test_two_steps_are_those_of_the_formula(monkeypatch, rescale):
    """Momentum SGD on the scores of one layer, with draws fixed and every batch the whole set."""
    draws = iter([MASK, ~MASK] + [MASK] * 9)
    monkeypatch.setattr(supermask, "_draw", lambda probabilities, generator: next(draws))
    found = learn(linear(), rows(), 2, batch_size=5, lr=0.7, momentum=0.6, rescale=rescale, samples=1)
    scores, velocity = torch.zeros(2, 3, dtype=torch.float64), 0
    for drawn in (MASK.double(), 1 - MASK.double()):
        scale = 6 / drawn.sum() if rescale else 1.0
        logits = IMAGES.double() @ (W * drawn * scale).T + torch.tensor([0, 0.25])
        by_weight = (logits.softmax(1) - F.one_hot(LABELS)).T @ IMAGES.double() / 5
        by_draw = by_weight * W * scale
        if rescale:  # each weight kept makes the others smaller
            by_draw -= (by_weight * W * drawn).sum() * scale / drawn.sum()
        p = scores.sigmoid()
        velocity = 0.6 * velocity + by_draw * p * (1 - p)
        scores -= 0.7 * velocity
    torch.testing.assert_close(found.probabilities["1"].double(), scores.sigmoid(), rtol=0, atol=1e-6)
    assert torch.equal(found.masks["1"], scores > 0) and found.history[0]["iteration"] == 2


def test_the_same_seed_gives_the_same_and_evaluating_changes_nothing():
    model, random = perceptron(), torch.get_rng_state()
    one, two, often = learn(model), learn(model), learn(model, evaluate_every=1, samples=3)
    other = learn(model, seed=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert one.history == two.history and len(often.history) == 6
    for name, probabilities in one.probabilities.items():
        assert torch.equal(probabilities, two.probabilities[name]) and torch.equal(
            probabilities, often.probabilities[name]
        )
        assert not torch.equal(probabilities, other.probabilities[name])


@pytest.mark.parametrize("rescale", [False, True])
def test_masks_are_learned_that_a_model_can_take(rescale):
    model, data, told = perceptron(), tiny(size=400), []
    for layer in (model[1], model[3]):
        layer.weight.data.mul_(2)  # half of them will be dropped
    before = state(model)
    found = learn(model, data, 300, batch_size=100, lr=20, rescale=rescale, evaluate_every=120, on_metrics=told.append)
    assert state(model) == before and all(p.requires_grad and p.grad is None for p in model.parameters())
    assert told == found.history and [row["iteration"] for row in told] == [120, 240, 300]
    assert told[-1]["train_loss"] < 0.95 * told[0]["train_loss"]
    assert min(told[-1]["test_accuracy"], told[-1]["thresholded_test_accuracy"]) > 0.55  # of three classes
    weights = get_masks(model)
    assert {name: mask.shape for name, mask in found.masks.items()} == {n: m.shape for n, m in weights.items()}
    assert all(torch.equal(mask, found.probabilities[name] > 0.5) for name, mask in found.masks.items())
    kept, total = (sum(t.sum().item() for t in tensors.values()) for tensors in (found.probabilities, weights))
    assert told[-1]["density"] == pytest.approx(kept / total)

    under = supermask.untrained_accuracy(model, lth.snapshot(model), found.masks, data, rescale=rescale)
    assert under == {split: told[-1][f"thresholded_{split}_accuracy"] for split in under}
    set_masks_(model, found.masks)
    for layer in (model[1], model[3]):
        layer.weight.data.mul_(layer.weight.numel() / layer.weight_mask.sum() if rescale else 1)
    loss = F.cross_entropy(model(data.validation.images), data.validation.labels).item()
    assert told[-1]["thresholded_validation_loss"] == pytest.approx(loss)


def test_sampled_evaluations_are_means_over_draws(monkeypatch):
    draws = iter([MASK] + [MASK, ~MASK, MASK])  # one for the step
    monkeypatch.setattr(supermask, "_draw", lambda probabilities, generator: next(draws))
    found = learn(linear(), rows(), 1, batch_size=5, samples=3).history[0]
    bias = torch.tensor([0, 0.25])
    kept, others = (accuracy(IMAGES @ (W * mask).T + bias, LABELS) for mask in (MASK, ~MASK))
    assert kept != others and found["test_accuracy"] == pytest.approx((2 * kept + others) / 3)


def test_what_is_pruned_stays_pruned():
    model = lth.prune_(perceptron(), 0.5)
    found = learn(model, momentum=0.9, rescale=True)
    for name, mask in get_masks(model).items():
        assert not found.probabilities[name][~mask].any() and not found.masks[name][~mask].any()
        assert (found.probabilities[name][mask] > 0).all() and 0 < found.masks[name].sum() < mask.sum()


def test_weights_that_no_image_reaches_are_as_likely_as_not_and_dropped():
    found = learn(linear(), rows(IMAGES * torch.tensor([1, 0, 1])), batch_size=5)
    assert (found.probabilities["1"] == 0.5).tolist() == [[False, True, False]] * 2
    assert not found.masks["1"][:, 1].any() and found.masks["1"].any()


def test_an_emptied_layer_is_no_failure():
    model = perceptron()
    masks = get_masks(model) | {"3": torch.zeros(3, 24, dtype=torch.bool)}
    found = supermask.untrained_accuracy(model, lth.snapshot(model), masks, tiny(), rescale=True)
    logits = model[3].bias.expand(200, 3)
    assert found["test"] == accuracy(logits, tiny().test.labels)


def test_a_network_with_batch_norm_and_tied_weights_learns_and_stays_as_it_was():
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 16), nn.Linear(16, 16)]
    model = nn.Sequential(*body, nn.Linear(16, 3))
    model[4].weight = model[3].weight
    before = state(lth.sparsify_(model))
    found = learn(model)
    assert state(model) == before and list(found.masks) == ["0", "3", "5"]
    assert all((p != 0.5).any() and not p.isnan().any() for p in found.probabilities.values())


def test_the_papers_network_learns_by_the_order_of_the_engine(monkeypatch):
    data, taken = tiny(classes=10), []
    batches = Order.batches
    monkeypatch.setattr(Order, "batches", lambda self, *given: taken.append(batches(self, *given)) or taken[-1])
    learn(lth.sparsify_(models.build("lenet-300-100", data.input_shape, generator=seeded())), data)
    epochs = torch.cat([part.flatten() for part in taken]).view(2, 60)
    assert (epochs.sort().values == torch.arange(60)).all() and not torch.equal(*epochs)


@pytest.mark.gpu
def test_everything_is_computed_where_the_data_lies():
    here, model = tiny(), perceptron()
    there = here._replace(**{n: Split(*(t.cuda() for t in getattr(here, n))) for n in ("train", "validation", "test")})
    found = learn(model, there)
    assert all(p.is_cuda and p.shape == found.masks[name].shape for name, p in found.probabilities.items())
    start = lth.snapshot(model)
    accuracies = [supermask.untrained_accuracy(model, start, found.masks, data) for data in (here, there)]
    assert accuracies[0] == pytest.approx(accuracies[1], abs=0.01)  # a tie in 100
    assert not any(parameter.is_cuda for parameter in model.parameters())
