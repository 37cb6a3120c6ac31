"""Pruning: exact counts, seeded ties, nested masks, rates and scopes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lth_sparse as lth
from lth_sparse.masks import masked_weights
from lth_sparse.prune import lowest, rate_to_reach


def chain(*widths, values=None):
    """Linear layers 0, 1, ... of these widths, masked; all weights `values` if given."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(i, o) for i, o in zip(widths, widths[1:], strict=False)))
    if values is not None:
        for layer in model:
            nn.init.constant_(layer.weight, values)
    return lth.sparsify_(model)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def masks(model):
    return {weight.name: weight.mask.clone() for weight in masked_weights(model)}


def kept(model):
    return [int(weight.mask.sum()) for weight in masked_weights(model)]


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(1, 7), min_size=2, max_size=4),
    rates=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=3),
    scope=st.sampled_from(["layer", "global"]),
    levels=st.sampled_from([1, 3, 10**6]),
    seed=st.integers(0, 9),
)
def test_exactly_the_lowest_go_whatever_ties(widths, rates, scope, levels, seed):
    model, draw = chain(*widths), seeded(seed)
    for layer in model:  # `levels` different magnitudes: 1 makes every weight a tie
        signs = torch.randint(2, layer.weight.shape, generator=draw) * 2 - 1
        nn.init.zeros_(layer.weight).data += signs * torch.randint(1, levels + 1, layer.weight.shape, generator=draw)
    for rate in rates:
        before = masks(model)
        values = {weight.name: weight.parameter.detach().clone() for weight in masked_weights(model)}
        lth.prune_(model, rate, scope=scope, generator=draw)
        after = masks(model)
        for pool in [[name] for name in before] if scope == "layer" else [list(before)]:
            was, now = (torch.cat([side[name].flatten() for name in pool]) for side in (before, after))
            value = torch.cat([values[name].flatten() for name in pool])
            new = torch.cat([model.get_submodule(name).weight.detach().flatten() for name in pool])
            assert now.sum() == was.sum() - round(rate * int(was.sum())) and not (now & ~was).any()
            assert torch.equal(new, value * now)
            gone = was & ~now
            assert not gone.any() or not now.any() or value[gone].abs().max() <= value[now].abs().min()


@pytest.mark.parametrize("scope, counts", [("layer", [26, 2]), ("global", None)])
def test_all_equal_weights_lose_round_of_rate_times_kept(scope, counts):
    model = chain(8, 4, 1, values=-0.5)
    lth.prune_(model, 0.2, scope=scope)
    assert kept(model) == [26, 3] if scope == "layer" else sum(kept(model)) == 36 - 7
    lth.prune_(model, 0.2, scope=scope)
    assert kept(model) == [21, 2] if scope == "layer" else sum(kept(model)) == 29 - 6


def test_half_a_weight_rounds_to_even_as_pythons_round():
    assert [kept(lth.prune_(chain(n, 1), 0.5))[0] for n in (1, 3, 5, 7)] == [1, 1, 3, 3]


def test_ties_depend_on_the_seed_and_on_nothing_else():
    first, again, other = (
        masks(lth.prune_(chain(20, 20, values=1.0), 0.5, generator=seeded(seed)))["0"] for seed in (3, 3, 4)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    torch.manual_seed(99)
    default, once_more = (masks(lth.prune_(chain(20, 20, values=1.0), 0.5))["0"] for _ in range(2))
    assert torch.equal(default, once_more)
    rows = first.sum(1)
    assert first.sum() == other.sum() == 200 and rows.min() > 2 and rows.max() < 18  # spread, not a prefix


def test_without_ties_the_seed_changes_nothing():
    first, other = (masks(lth.prune_(chain(9, 9), 0.5, generator=seeded(s)))["0"] for s in (0, 1))
    assert torch.equal(first, other)


def test_random_pruning_is_nested_and_seeded():
    model, draw = chain(12, 12), seeded(0)
    for _ in range(3):
        before = masks(model)["0"]
        lth.prune_(model, 0.3, score="random", generator=draw)
        assert not (masks(model)["0"] & ~before).any()
    again, other = chain(12, 12), chain(12, 12)
    lth.prune_(again, 0.3, score="random", generator=seeded(0))
    lth.prune_(other, 0.3, score="random", generator=seeded(1))
    assert not (masks(model)["0"] & ~masks(again)["0"]).any()
    assert not torch.equal(masks(again)["0"], masks(other)["0"])


def test_global_scope_ranks_over_all_layers_and_spares_those_at_rate_0():
    model = chain(10, 10, 10, 10)
    for layer, scale in zip(model, (0.01, 1.0, 1e-6), strict=True):
        nn.init.uniform_(layer.weight, scale / 2, scale)
    lth.prune_(model, 0.5, scope="global", rates={"2": 0})
    assert kept(model) == [0, 100, 100]


def test_rates_go_by_pattern_and_the_last_one_wins():
    model = nn.ModuleDict({"fc1": nn.Linear(10, 10), "fc2": nn.Linear(10, 10), "head": nn.Linear(10, 10)})
    lth.prune_(lth.sparsify_(model), 0.5, rates={"fc*": 0.3, "fc2": 0, "?ead": 0.1})
    assert kept(model) == [70, 100, 90]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("values", [None, 0.7])
def test_keep_at_least(scope, values):
    model = chain(10, 5, 1, values=values)
    for left in ([5, 3], [3, 3], [3, 3]) if scope == "layer" else ():
        lth.prune_(model, 0.9, scope=scope, keep_at_least=3)
        assert kept(model) == left
    if scope == "global":
        for _ in range(4):
            lth.prune_(model, 0.9, scope=scope, keep_at_least=3)
        assert min(kept(model)) == 3 and sum(kept(model)) == 6
    assert kept(lth.prune_(model, 0.5, keep_at_least=50)) == [3, 3]


def test_keep_at_least_keeps_the_best_and_breaks_its_ties_by_seed():
    size = chain(10, 5)[0].weight.abs()
    model = lth.prune_(chain(10, 5), 0.99, keep_at_least=2)
    assert torch.equal(masks(model)["0"], size >= size.flatten().topk(2).values.min())
    first, *others = (
        masks(lth.prune_(chain(9, 1, values=1.0), 0.9, keep_at_least=2, generator=seeded(seed)))["0"]
        for seed in range(4)
    )
    assert not all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("rate", [0, 1, -0.1, 1.5, float("nan"), 20])
def test_a_rate_out_of_range_is_refused(rate):
    model = chain(4, 4, 4)
    with pytest.raises(ValueError, match=rf"^rate must lie in \(0, 1\), got {rate}$"):
        lth.prune_(model, rate)
    if rate != 0:
        with pytest.raises(ValueError, match=rf"^the rate of '1' must lie in \[0, 1\), got {rate}$"):
            lth.prune_(model, rates={"1": rate})
    assert lth.density(model) == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scope": "model"}, "unknown scope 'model': choose from layer, global, erk"),
        ({"rates": {"head": 0.1}}, "no layer matches 'head': the model has '0', '1'"),
        ({"scope": "global", "rates": {"1": 0.1}}, r"scope 'global' .* '1' may only be 0 \(kept whole\), got 0.1"),
        ({"scope": "erk", "rates": {"1": 0.1}}, r"scope 'erk' .* '1' may only be 0 \(kept whole\), got 0.1"),
        ({"keep_at_least": -1}, "keep_at_least must be 0 or more, got -1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    model = chain(4, 4, 4)
    with pytest.raises(ValueError, match=f"^{message}$"):
        lth.prune_(model, **options)
    assert lth.density(model) == 1


def test_a_model_without_masks_is_refused():
    with pytest.raises(ValueError, match=r"^the model has no masked layers: call lth_sparse.sparsify_\(model\) first$"):
        lth.prune_(nn.Linear(2, 2))


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([-1.0, 0.0, 0.1, float("inf")]), min_size=1, max_size=20),
    st.sampled_from([torch.float32, torch.float64]),
    st.data(),
)
def test_lowest_marks_exactly_count(values, dtype, data):
    value = torch.tensor(values, dtype=dtype)
    among = torch.tensor(data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values))))
    count = data.draw(st.integers(0, int(among.sum())))
    out = lowest(value, among, count, seeded(0))
    assert out.sum() == count and not (out & ~among).any()
    assert sorted(value[out].tolist()) == sorted(value[among].tolist())[:count]


def kept_after_erk(model, rate, **options):
    return kept(lth.prune_(model, rate, scope="erk", **options))


def test_erk_shares_in_proportion_to_the_sum_of_the_dimensions():
    # 800, 400 and 200 weights, sums 60, 50 and 30
    assert kept_after_erk(chain(20, 40, 10, 20), 0.9) == [60, 50, 30]  # 140 stay
    assert kept_after_erk(chain(20, 40, 10, 20), 0.83) == [102, 85, 51]  # 238 stay


def test_erk_counts_a_kernels_sides_too():
    model = lth.sparsify_(nn.Sequential(nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(32, 13)))
    # 288 and 416 weights, sums 8 + 4 + 3 + 3 = 18 and 45
    assert kept_after_erk(model, 1 - 126 / 704) == [36, 90]


def test_erk_gives_fractions_to_the_largest_remainders_and_ties_to_the_first():
    # sums 6, 6, 6: 10 stay of 27, 3 1/3 each
    assert kept_after_erk(chain(3, 3, 3, 3), 17 / 27) == [4, 3, 3]
    # sums 5, 8: 6 stay of 21, 2.31 and 3.69
    assert kept_after_erk(chain(2, 3, 5), 15 / 21) == [2, 4]


def test_erk_keeps_small_layers_whole_and_the_others_share_the_excess():
    # LeNet-300-100: sums 1084, 400, 110; 0.8 * 266200 = 212960 stay, of which fc2 and the output can take 31000
    assert kept_after_erk(chain(784, 300, 100, 10), 0.2) == [181960, 30000, 1000]


def test_erk_leaves_layers_below_their_share_what_they_have():
    model = chain(20, 40, 10, 20)
    lth.prune_(model, rates={"0": 0.99, "1": 0, "2": 0})
    assert kept(model) == [8, 400, 200]
    before = masks(model)
    assert kept_after_erk(model, 0.5) == [8, 185, 111]  # 304 stay: 296 at 50 to 30
    assert torch.equal(masks(model)["0"], before["0"])
    assert all(not (after & ~before[name]).any() for name, after in masks(model).items())


def test_erk_leaves_layers_at_rate_0_out_of_the_count():
    assert kept_after_erk(chain(20, 40, 10, 20), 0.9, rates={"0": 0}) == [800, 38, 22]  # 60 of 600, at 50 to 30: 37.5
    assert kept_after_erk(chain(4, 4, 4), 0.9, rates={"?": 0}) == [16, 16]


def test_erk_keeps_at_least_that_many():
    assert kept_after_erk(chain(20, 40, 10, 20), 0.95, keep_at_least=20) == [27, 23, 20]  # 70 stay: 50 at 60 to 50
    assert kept_after_erk(chain(20, 40, 10, 20), 0.99, keep_at_least=20) == [20, 20, 20]


@settings(max_examples=60)
@given(
    widths=st.lists(st.integers(1, 9), min_size=2, max_size=5),
    before=st.lists(st.floats(0.01, 0.99), min_size=4, max_size=4),
    rate=st.floats(0.01, 0.99),
    least=st.integers(0, 5),
)
def test_erk_prunes_exactly_round_of_rate_times_kept_in_all(widths, before, rate, least):
    model = chain(*widths)
    lth.prune_(model, rates={str(i): own for i, own in zip(range(len(model)), before, strict=False)})
    was, sizes = kept(model), [sum(layer.weight.shape) for layer in model]
    now = kept_after_erk(model, rate, keep_at_least=least)
    floors = [min(count, least) for count in was]
    assert sum(now) == max(sum(was) - round(rate * sum(was)), sum(floors))
    assert all(low <= count <= high for low, count, high in zip(floors, now, was, strict=True))
    between = [(n, size) for n, size, low, high in zip(now, sizes, floors, was, strict=True) if low < n < high]
    scales = [((n - 1) / size, (n + 1) / size) for n, size in between]  # of one scale, up to the rounding
    assert not scales or max(low for low, _ in scales) < min(high for _, high in scales)


def test_the_rate_to_reach_a_density_in_some_rounds():
    assert rate_to_reach(0.25, 2) == 0.5 and rate_to_reach(0.25, 1) == 0.75
    assert (1 - rate_to_reach(0.05, 7)) ** 7 == pytest.approx(0.05)


@pytest.mark.parametrize("density", [0, 1, -0.5, 1.5, float("nan")])
def test_a_density_out_of_range_is_refused(density):
    with pytest.raises(ValueError, match=rf"^density must lie in \(0, 1\), got {density}$"):
        rate_to_reach(density, 3)


@pytest.mark.parametrize("rounds", [0, -2, 0.5])
def test_rounds_out_of_range_are_refused(rounds):
    with pytest.raises(ValueError, match=f"^rounds must be 1 or more, got {rounds}$"):
        rate_to_reach(0.5, rounds)
