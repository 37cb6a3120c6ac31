"""Scores: what each ranks, what they may look at, and what is refused."""

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse import scores


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


@pytest.mark.parametrize("ingredient", ["initial", "best", "gradients", "batches"])
def test_a_missing_ingredient_is_named(ingredient):
    with pytest.raises(ValueError, match=rf"^the score needs '{ingredient}'.*prune_\(\.\.\., {ingredient}=\.\.\.\)$"):
        lth.prune_(single(), 0.5, score=lambda given: given.need(ingredient))
    assert context(**{ingredient: []}).need(ingredient) == []


@pytest.mark.parametrize(
    "score, message",
    [
        ("magnitud", "unknown score 'magnitud': choose from magnitude, random, or pass a function"),
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
