"""Scores: what each ranks, what they may look at, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lth_sparse as lth
from lth_sparse import scores
from lth_sparse.masks import masked_weights


def context(**ingredients):
    final = {"a": torch.tensor([[-3.0, 1.0], [0.0, 2.0]]), "b": torch.tensor([0.5, -0.5])}
    masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in final.items()}
    return scores.Context(final, masks, torch.Generator().manual_seed(0), **ingredients)


def single():
    torch.manual_seed(0)
    return lth.sparsify_(nn.Linear(3, 2))


def test_magnitude_ignores_the_sign():
    got = scores.compute("magnitude", context())
    assert got["a"].tolist() == [[3, 1], [0, 2]] and got["b"].tolist() == [0.5, 0.5]


INITIAL = [-2.0, 1.0, 0.5, 0.0, -1.0, 0.0, 3.0, 2.0]
FINAL = [-3.0, -1.0, 0.5, 2.0, 0.0, 0.0, 1.0, 0.0]
KEPT = [True] * 7 + [False]  # the last was pruned before


def pruned_before(**ingredients):
    final, initial = ({"a": torch.tensor(values).view(2, 4)} for values in (FINAL, INITIAL))
    masks = {"a": torch.tensor(KEPT).view(2, 4)}
    return scores.Context(final, masks, torch.Generator().manual_seed(0), **{"initial": initial, **ingredients})


@pytest.mark.parametrize(
    "name, wanted",
    [
        ("magnitude", [3, 1, 0.5, 2, 0, 0, 1]),
        ("large-final", [3, 1, 0.5, 2, 0, 0, 1]),
        ("small-final", [-3, -1, -0.5, -2, 0, 0, -1]),
        ("large-init", [2, 1, 0.5, 0, 1, 0, 3]),
        ("small-init", [-2, -1, -0.5, 0, -1, 0, -3]),
        ("magnitude-increase", [1, 0, 0, 2, -1, 0, -2]),
        ("movement", [1, 2, 0, 2, 1, 0, 2]),
        ("large-final-same-sign", [3, 0, 0.5, 0, 0, 0, 1]),
        ("large-final-diff-sign", [0, 1, 0, 2, 0, 0, 0]),
        ("magnitude-increase-same-sign", [1, 0, 0, 0, 0, 0, -2]),
        ("magnitude-increase-diff-sign", [0, 0, 0, 2, -1, 0, 0]),
        # smaller |w_f| among seven: 6 3 2 5 0 0 3, smaller |w_i|: 5 3 2 0 3 0 6
        ("large-init-large-final", [5 / 7, 3 / 7, 2 / 7, 0, 0, 0, 3 / 7]),
        ("small-init-small-final", [-6 / 7, -3 / 7, -2 / 7, -5 / 7, -3 / 7, 0, -6 / 7]),
    ],
)
def test_what_the_two_values_of_a_weight_are_worth(name, wanted):
    got = scores.compute(name, pruned_before())["a"]
    assert got.shape == (2, 4) and torch.allclose(got.flatten()[:7], torch.tensor(wanted, dtype=torch.float32))
    if name not in ("large-init", "small-init"):
        diverged = pruned_before()
        diverged.final["a"][0, 0] = float("nan")
        with pytest.raises(ValueError, match="NaN"):
            scores.compute(name, diverged)


def test_every_name_of_a_score_is_tested_here():
    by_gradients = {"random", "snip", "gradient", "stability", "lrp", "synflow"}
    (mark,) = (m for m in test_what_the_two_values_of_a_weight_are_worth.pytestmark if m.name == "parametrize")
    assert {name for name, _ in mark.args[1]} | by_gradients == set(scores.SCORES)


@settings(max_examples=40)
@given(
    count=st.integers(1, 12),
    levels=st.sampled_from([3, 10**6]),
    scale=st.sampled_from([1e-3, 40.0]),
    seed=st.integers(0, 9),
)
def test_alpha_lets_both_sides_prune_equally_many(count, levels, scale, seed):
    """What min(alpha |w_f|, |w_i|) keeps lies above one quantile on both sides, however the sides are scaled."""
    draw = torch.Generator().manual_seed(seed)
    final, initial = (torch.randint(-levels, levels, (count,), generator=draw).double() for _ in "fi")
    given = scores.Context({"a": scale * final}, {"a": torch.ones(count, dtype=torch.bool)}, draw, {"a": initial})
    score = scores.compute("large-init-large-final", given)["a"]
    for threshold in score:
        sides = [((w.abs()[:, None] > w.abs()).sum(1) / count) >= threshold for w in (final, initial)]
        assert torch.equal(score >= threshold, sides[0] & sides[1])


def test_signs_that_changed_go_first_and_ties_are_drawn():
    initial = {"weight": torch.tensor([[1.0, 1.0, 1.0], [-1.0, -1.0, -1.0]])}
    masks = set()
    for seed in range(20):
        model = single()
        with torch.no_grad():
            model.weight.copy_(torch.tensor([[0.1, -9.0, -9.0], [-0.1, 9.0, -0.2]]))
        draw = torch.Generator().manual_seed(seed)
        lth.prune_(model, 1 / 3, score="large-final-same-sign", initial=initial, generator=draw)
        assert model.weight_mask[0, 0] and model.weight_mask[1, 0] and model.weight_mask[1, 2]
        masks.add(tuple(model.weight_mask.flatten().tolist()))
    assert len(masks) == 3


def test_stability_prunes_what_moved_most_since_the_best():
    best = {"a": torch.tensor([[-1.0, -1.5, 0.5, 2.0], [0.25, 0.0, 1.0, 9.0]])}
    assert scores.compute("stability", pruned_before(best=best))["a"].flatten()[:7].tolist() == [
        -2,
        -0.5,
        0,
        0,
        -0.25,
        0,
        0,
    ]
    model, final = single(), torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    with torch.no_grad():
        model.weight.copy_(final)
    lth.prune_(model, 1 / 3, score="stability", best={"weight": final + torch.tensor([[0, 0.1, -3], [0.2, 2, 0.3]])})
    assert model.weight_mask.tolist() == [[True, True, False], [True, False, True]]


def test_nothing_is_pruned_where_best_is_final():
    same = {"a": torch.tensor(FINAL).view(2, 4) + torch.tensor([0.0] * 7 + [5.0]).view(2, 4)}
    assert scores.compute("stability", pruned_before(best=same)) is None
    for score in ("stability", lambda given: None):
        model = lth.prune_(single(), 0.5)
        mask, best = model.weight_mask.clone(), {"weight": model.weight.detach().clone()}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        assert lth.prune_(model, 0.5, score=score, optimizer=optimizer, best=best) is model
        assert torch.equal(model.weight_mask, mask) and torch.equal(model.weight, best["weight"])


class Counter(nn.Flatten):
    """Writes a buffer in eval mode too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x):
        self.calls += 1
        return super().forward(x)


def network():
    """Convolution, batch norm that has seen data, dropout, Linear: masked, pruned, float64, in training mode."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), Counter(), nn.Linear(12, 4)
    model = lth.sparsify_(nn.Sequential(*layers).double())
    model(torch.randn(20, 1, 4, 4, dtype=torch.float64))
    model[3].eval()
    return lth.prune_(model, 0.3)


def batches(*sizes):
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 4, 4, generator=draw).double(), torch.randint(4, (n,), generator=draw)) for n in sizes]


def scored(name, model, **ingredients):
    """What `prune_` would rank by."""
    found = {}

    def score(given):
        found.update(scores.compute(name, given))

    lth.prune_(model, 0.5, score=score, **ingredients)
    return found


def by_hand(model, output, images, labels):
    """Gradients of the same function in plain torch layers."""
    plain = lth.densify_(copy.deepcopy(model)).eval()
    weights = {name: plain[int(name)].weight for name in ("0", "5")}
    found = torch.autograd.grad(output(plain(images), labels), list(weights.values()))
    return {name: (weights[name].detach(), g) for name, g in zip(weights, found, strict=True)}


def true_logits(logits, labels):
    return logits[torch.arange(len(labels)), labels].mean()


@pytest.mark.parametrize(
    "name, output, formula",
    [
        ("snip", nn.functional.cross_entropy, lambda w, g: (w * g).abs()),
        ("gradient", nn.functional.cross_entropy, lambda w, g: g.abs()),
        ("lrp", true_logits, lambda w, g: w * g),
    ],
)
def test_gradients_are_those_of_all_samples_together(name, output, formula):
    model, parts = network(), batches(5, 2)
    images, labels = (torch.cat(side) for side in zip(*parts, strict=True))
    wanted = by_hand(model, output, images, labels)
    got = scored(name, model, batches=parts)
    for layer, (weight, gradient) in wanted.items():
        mask = model[int(layer)].weight_mask
        assert torch.allclose(got[layer], formula(weight, gradient) * mask, rtol=1e-12)
        assert (got[layer][~mask] == 0).all() and (got[layer][mask] != 0).any()


def test_given_gradients_are_taken_and_computed_ones_kept():
    gradients = {"a": torch.arange(-4.0, 4.0).view(2, 4)}
    assert scores.compute("gradient", pruned_before(gradients=gradients))["a"].flatten().tolist() == [
        4,
        3,
        2,
        1,
        0,
        1,
        2,
        3,
    ]
    assert scores.compute("snip", pruned_before(gradients=gradients))["a"].flatten().tolist() == [
        12,
        3,
        1,
        2,
        0,
        0,
        2,
        0,
    ]
    model = network()
    given = scores.Context({"0": model[0].weight, "5": model[5].weight}, {}, None, batches=batches(3), model=model)
    assert given.gradients is None and given.need("gradients") is given.need("gradients") is given.gradients


@pytest.mark.parametrize("name", ["snip", "gradient", "lrp", "synflow"])
def test_the_model_is_left_exactly_as_it_was(name):
    model = network()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[5].weight.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    versions = [tensor._version for tensor in [*model.parameters(), *model.buffers()]]
    random_state = torch.get_rng_state()
    with torch.no_grad():
        first = scored(name, model, batches=batches(5))
    assert all((score != 0).any() for score in first.values())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [tensor._version for tensor in [*model.parameters(), *model.buffers()]] == versions
    assert [layer.training for layer in model] == [True, True, True, False, True, True] and model.training
    assert (model[0].weight.grad == 1).all() and all(p.grad is None for p in list(model.parameters())[1:])
    assert model[0].weight.requires_grad and not model[5].weight.requires_grad
    assert torch.equal(torch.get_rng_state(), random_state)
    with pytest.raises(RuntimeError):
        scored(name, model, batches=[(torch.ones(1, 1, 9, 9), torch.zeros(1, dtype=torch.int64))])
    assert [layer.training for layer in model] == [True, True, True, False, True, True] and model.training


@pytest.mark.parametrize("name", ["snip", "lrp", "synflow"])
def test_attention_and_shared_weights_are_scored(name):
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.first, self.second = nn.MultiheadAttention(4, 2), nn.Linear(4, 4), nn.Linear(4, 4)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(self.attention(x, x, x, need_weights=False)[0]))

    torch.manual_seed(0)
    model = lth.prune_(lth.sparsify_(Reader()), 0.25)
    got = scored(name, model, batches=[(torch.randn(6, 4), torch.arange(6) % 4)])
    for weight in masked_weights(model):
        assert (got[weight.name][weight.mask] != 0).any() and (got[weight.name][~weight.mask] == 0).all()


def test_relevance_is_that_of_layer_wise_propagation():
    """Literally: unit j hands the share a_i w_ji / z_j of its relevance to unit i; it begins as the true logit."""
    torch.manual_seed(0)
    model = lth.prune_(lth.sparsify_(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()), 0.2)
    images, labels = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    first, second = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(2, 4, dtype=torch.float64)
    with torch.no_grad():
        for x, label in zip(images, labels, strict=True):
            z = model[0](x)
            a = z.relu()
            logit = model[2](a)[label]
            through = a * model[2].weight[label] / logit * logit
            second[label] += through / len(images)
            first += x * model[0].weight / z[:, None] * through[:, None] / len(images)
    got = scored("lrp", model, batches=[(images[:2], labels[:2]), (images[2:], labels[2:])])
    assert torch.allclose(got["0"], first, rtol=1e-10) and torch.allclose(got["2"], second, rtol=1e-10)
    assert (first < 0).any() and (first > 0).any()


def test_synaptic_flow_by_hand():
    model = lth.sparsify_(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1)))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[-4.0, 5.0]]))
    model[0].weight_mask[0, 0] = False
    lth.sync_(model)
    images = torch.full((7, 2), float("nan"))
    got = scored("synflow", model, batches=iter([(images, torch.zeros(7)), None]))
    assert got["0"].tolist() == [[0, 8], [15, 0]] and got["2"].tolist() == [[8, 15]]
    assert got["0"].dtype == torch.float64 and model[0].weight.dtype == torch.float32


def test_synaptic_flow_is_conserved_from_layer_to_layer():
    torch.manual_seed(0)
    widths = 1, *[4] * 30
    layers = [
        [nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU()] for i, o in zip(widths, widths[1:], strict=False)
    ]
    model = nn.Sequential(*sum(layers, []), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 5))
    model(torch.randn(8, 1, 4, 4))
    lth.prune_(lth.sparsify_(model), 0.2)
    got = scored("synflow", model, batches=[(torch.randn(3, 1, 4, 4), torch.arange(3))])
    sums = torch.stack([score.sum() for score in got.values()])
    assert len(sums) == 31 and sums[0] > 0 and torch.allclose(sums, sums[0], rtol=1e-10)
    assert all((score >= 0).all() for score in got.values())


def test_random_depends_on_the_generator_alone():
    first, again = scores.compute("random", context()), scores.compute("random", context())
    assert all(torch.equal(first[name], again[name]) and first[name].shape == again[name].shape for name in "ab")
    assert first["a"].unique().numel() == 4 and (first["a"] < 1).all() and (first["a"] >= 0).all()
    stream = context()
    assert not torch.equal(scores.compute("random", stream)["a"], scores.compute("random", stream)["a"])


def test_a_function_sees_weights_masks_and_ingredients():
    model, seen = lth.prune_(single(), 0.5), []

    def score(given):
        seen.append(given)
        return {name: -given.need("initial")[name] for name in given.final}

    initial = {"weight": torch.arange(6.0).view(2, 3)}
    before, mask = model.weight.detach().clone(), model.weight_mask.clone()
    lth.prune_(model, 1 / 3, score=score, initial=initial)
    assert torch.equal(seen[0].masks["weight"], model.weight_mask) and not seen[0].final["weight"].requires_grad
    assert torch.equal(model.weight.detach(), before * model.weight_mask)
    gone = mask & ~model.weight_mask
    assert initial["weight"][gone] == initial["weight"][mask].max()  # the score was minus the initial weight


@pytest.mark.parametrize(
    "ingredient, names",
    [
        ("initial", "large-init small-init large-init-large-final small-init-small-final magnitude-increase movement"),
        ("initial", "large-final-same-sign large-final-diff-sign"),
        ("initial", "magnitude-increase-same-sign magnitude-increase-diff-sign"),
        ("best", "stability"),
        ("gradients", "snip gradient"),
        ("batches", "lrp synflow"),
    ],
)
def test_a_missing_ingredient_is_named(ingredient, names):
    instead = r" or prune_\(\.\.\., batches=\.\.\.\)" if ingredient == "gradients" else ""
    passing = rf"pass prune_\(\.\.\., {ingredient}=\.\.\.\){instead}"
    for name in names.split():
        model = single()
        with pytest.raises(ValueError, match=f"^the score needs '{ingredient}', which was not given: {passing}$"):
            lth.prune_(model, 0.5, score=name)
        assert lth.density(model) == 1


@pytest.mark.parametrize("ingredient, name", [("initial", "movement"), ("best", "stability"), ("gradients", "snip")])
def test_an_ingredient_of_another_model_is_refused(ingredient, name):
    for other, got in ({"0": torch.ones(2, 3)}, "no tensor"), ({"weight": torch.ones(3, 2)}, r"shape \(3, 2\)"):
        with pytest.raises(ValueError, match=rf"^'{ingredient}' gave {got} for layer 'weight', wanted shape \(2, 3\)$"):
            lth.prune_(single(), 0.5, score=name, **{ingredient: other})


@pytest.mark.parametrize("name", ["snip", "gradient", "lrp", "synflow"])
def test_no_samples_are_refused(name):
    for batches in [], [(torch.ones(0, 3), torch.ones(0, dtype=torch.int64))]:
        with pytest.raises(ValueError, match="^the score needs samples, but batches holds none: .* pairs$"):
            lth.prune_(single(), 0.5, score=name, batches=batches)


@pytest.mark.parametrize(
    "score, message",
    [
        ("magnitud", "unknown score 'magnitud': choose from magnitude, large-final, .*, synflow, or pass a function"),
        (lambda c: {}, r"the score gave no tensor for layer 'weight', wanted shape \(2, 3\)"),
        (lambda c: [1], r"the score gave no tensor for layer 'weight', wanted shape \(2, 3\)"),
        (lambda c: {"weight": 1.0}, r"the score gave no tensor for layer 'weight', wanted shape \(2, 3\)"),
        (lambda c: {"weight": torch.ones(3, 2)}, r"the score gave shape \(3, 2\) for layer 'weight', wanted.*\(2, 3\)"),
        (lambda c: {"weight": c.final["weight"].log()}, "the score of layer 'weight' holds NaN: .*diverged"),
    ],
)
def test_a_wrong_score_is_refused_in_one_sentence_and_prunes_nothing(score, message):
    model = single()
    with pytest.raises(ValueError, match=f"^{message}$"):
        lth.prune_(model, 0.5, score=score)
    assert lth.density(model) == 1


def test_diverged_weights_are_not_ranked():
    model = single()
    nn.init.constant_(model.weight, float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        lth.prune_(model, 0.5)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64])
def test_scores_of_any_dtype_rank(dtype):
    values = torch.tensor([[1, 0, 1], [0, 1, 0]]).to(dtype)
    if dtype.is_floating_point:
        values.requires_grad_()
    model = lth.prune_(single(), 0.5, score=lambda c: {"weight": values})
    assert torch.equal(model.weight_mask, values.bool())


def test_float64_scores_are_ranked_as_float64():
    values = 1 + 1e-12 * torch.tensor([[3, 0, 1], [5, 4, 2]], dtype=torch.float64)
    model = lth.prune_(single(), 0.5, score=lambda c: {"weight": values})
    assert model.weight_mask.tolist() == [[True, False, False], [True, True, False]]


def test_infinite_scores_go_first_or_last():
    values = torch.tensor([[-torch.inf, torch.inf, 1.0], [-torch.inf, torch.inf, -torch.inf]])
    model = lth.prune_(single(), 0.5, score=lambda c: {"weight": values}, keep_at_least=1)
    assert torch.equal(model.weight_mask, values > -torch.inf)
