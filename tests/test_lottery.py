"""Finding tickets: exact rewinds and counts around any training, and what the arms do between rounds."""

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse import arms
from lth_sparse.lottery import Chain, find_ticket, frozen_weights, merged, search
from lth_sparse.masks import get_masks, masked_weights
from lth_sparse.training import Result


def small(seed=0):
    torch.manual_seed(seed)
    layers = nn.Linear(16, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 4)
    return lth.sparsify_(nn.Sequential(*layers))


class Training:
    """A training of one's own; keeps what each model held before it, and counts."""

    def __init__(self):
        self.before, self.masks = [], []

    def __call__(self, model):
        self.before.append(lth.snapshot(model))
        self.masks.append({w.name: w.mask.clone() for w in masked_weights(model)})
        generator = torch.Generator().manual_seed(len(self.before))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
        for _ in range(4):
            loss = model(torch.rand(12, 16, generator=generator)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return {"loss": float(loss.detach())}


def test_every_round_starts_exactly_where_the_first_did():
    model, train, seen = small(), Training(), []
    start = lth.snapshot(model)
    rounds = find_ticket(model, train, rounds=4, rate=0.2, on_metrics=seen.append)
    assert [r.round for r in rounds] == [0, 1, 2, 3, 4]
    kept = [{name: int(mask.sum()) for name, mask in r.masks.items()} for r in rounds]
    # a fifth of what is there, rounded: 320 - 64 = 256, 256 - 51 = 205, 205 - 41 = 164, 164 - 33 = 131
    assert [k["0"] for k in kept] == [320, 256, 205, 164, 131] and [k["3"] for k in kept] == [80, 64, 51, 41, 33]
    for i, (before, masks) in enumerate(zip(train.before, train.masks, strict=True)):
        for name, tensor in start.items():
            layer, _, kind = name.partition(".")
            wanted = tensor * masks[layer] if kind == "weight" and layer in masks else tensor
            assert torch.equal(before[name], wanted), (i, name)
        assert all(torch.equal(rounds[i].masks[name], mask) for name, mask in masks.items())
    assert start["1.num_batches_tracked"] == 0 and model[1].num_batches_tracked == 4
    wanted = [{"round": r.round, "density": r.density, "metrics": r.metrics} for r in rounds]
    assert seen == wanted and rounds[2].density == 256 / 400 and rounds[0].metrics["loss"] > 0


def test_what_goes_is_the_smallest_of_the_trained_weights():
    model, finals = small(), []
    train = Training()

    def keeping(model):
        metrics = train(model)
        finals.append(model[0].weight.detach().abs().clone())
        return metrics

    rounds = find_ticket(model, keeping, rounds=2, rate=0.5)
    for before, after, final in zip(rounds, rounds[1:], finals, strict=False):
        gone = before.masks["0"] & ~after.masks["0"]
        assert gone.any() and final[gone].max() < final[after.masks["0"]].min()


def test_rewind_to_a_snapshot_of_ones_own():
    model, train = small(), Training()
    later = lth.snapshot(model)
    later = {name: tensor + 1 for name, tensor in later.items()}
    begin = lth.snapshot(model)
    rounds = find_ticket(model, train, rounds=1, rewind=later)
    assert torch.equal(train.before[0]["0.weight"], begin["0.weight"])
    assert torch.equal(train.before[1]["0.weight"], later["0.weight"] * train.masks[1]["0"])
    assert torch.equal(train.before[1]["1.running_var"], later["1.running_var"])
    assert train.before[1]["1.num_batches_tracked"] == 1 and rounds[1].start.keys() == later.keys()


def test_a_round_brings_its_ticket_back():
    train = Training()
    rounds = find_ticket(small(), train, rounds=3, rate=0.3)
    other = small(seed=9)
    for wanted in (1, 3, 0):
        assert rounds[wanted].ticket_(other) is other
        found = lth.snapshot(other)
        assert all(torch.equal(found[name], tensor) for name, tensor in train.before[wanted].items())
        assert lth.density(other) == rounds[wanted].density


def test_a_layer_that_runs_empty_ends_it():
    model = lth.sparsify_(nn.Sequential(nn.Linear(12, 1)))
    rounds = find_ticket(model, lambda model: nn.init.constant_(model[0].bias, 3.0), rounds=9, rate=0.9)
    assert [int(r.masks["0"].sum()) for r in rounds] == [12, 1]  # round(0.9) of the last one goes
    assert lth.density(model) == 1 / 12 and model[0].weight.count_nonzero() == 1 and model[0].bias == 3.0, "as trained"
    assert lth.density(rounds[-1].ticket_(model)) == 1 / 12


@pytest.mark.parametrize(
    "wrong",
    [
        *({"score": "best"}, {"rate": 1.0}, {"rate": 0}, {"rate": float("nan")}, {"rounds": -1}),
        *({"scope": "universe"}, {"rates": {"nowhere": 0.1}}, {"rates": {"0": 1.5}}),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused_before_training(wrong):
    train = Training()
    with pytest.raises(ValueError):
        find_ticket(small(), train, **{"rounds": 1} | wrong)
    assert not train.before


def test_other_refusals():
    with pytest.raises(ValueError):
        find_ticket(small(), Training(), rounds=1, rewind={})
    with pytest.raises(ValueError, match="sparsify_"):
        find_ticket(nn.Sequential(nn.Linear(2, 2)), Training())


ARMS = ("ticket", "reinit", "reinit-chain", "random")


def images():
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(12, 16, generator=generator), torch.randint(4, (12,), generator=generator))]


def chains(names=ARMS, trial=0, rewind=0, **pruning):
    made = {}
    for name in names:
        leaders = tuple(made[other] for other in arms.ARMS[name].masks_of)
        own = {"rate": 0.5, "score": arms.ARMS[name].score or "magnitude"} | pruning
        made[name] = Chain(small(), 7, name, trial, own, leaders=leaders, rewind=rewind, batches=images())
    return list(made.values())


def go(given, rounds=3, status="done"):
    """Run `search` with noise for a training; (arm, round) -> (ticket, values at its start, masks).

    Arms that are the same ticket in round 0 are there once. `chain.ends` has what training left in each round,
    `chain.frozen` the values that pruned weights had then.
    """
    seen, recorded = {}, []
    for chain in given:
        chain.ends, chain.frozen = {}, {}

    def train(tickets):
        return [one(ticket) for ticket in tickets]

    def one(ticket):
        arm, _, round = ticket.label.split("/")
        masks = {w.name: w.mask.clone() for w in masked_weights(ticket.model)}
        seen[arm, int(round[6:])] = (ticket, lth.snapshot(ticket.model), masks)
        torch.manual_seed(ticket.seed % 2**31)
        with torch.no_grad():
            for weight in masked_weights(ticket.model):
                weight.parameter.add_(0.1 * torch.randn(weight.parameter.shape) * weight.mask)
        chain = next(chain for chain in given if chain.model is ticket.model)
        chain.ends[int(round[6:])], chain.frozen[int(round[6:])] = (
            lth.snapshot(chain.model),
            frozen_weights(chain.model),
        )
        kept = lth.snapshot(ticket.model) if ticket.keep_at is not None else {}
        return Result(best=lth.snapshot(ticket.model), kept=kept, status=status)

    search(given, train, rounds, lambda chain, round, result: recorded.append((chain.arm, round)))
    assert set(recorded) >= set(seen) and len(recorded) == len(set(recorded))
    assert {round for _, round in set(recorded) - set(seen)} <= {0}
    return seen


def values(found, masks=None):
    """The kept values of all weights in one row."""
    _, snap, own = found
    return torch.cat([snap[f"{name}.weight"][mask] for name, mask in (masks or own).items()])


def test_what_each_arm_starts_from():
    seen = go(chains())
    assert set(seen) == {(arm, round) for arm in ARMS for round in range(4)}
    for round in range(4):
        masks = {arm: seen[arm, round][2] for arm in ARMS}
        assert all(sum(int(m.sum()) for m in own.values()) == 400 // 2**round for own in masks.values())
        for arm in ARMS:
            _, snap, own = seen[arm, round]
            assert not any(snap[f"{name}.weight"][~mask].any() for name, mask in own.items())
        assert torch.equal(values(seen["ticket", round]), values(seen["ticket", 0], masks["ticket"]))
        assert all(torch.equal(masks["reinit"][name], mask) for name, mask in masks["ticket"].items())
        for a, b in [("ticket", "reinit-chain"), ("ticket", "random"), ("random", "reinit-chain")]:
            assert round == 0 or not torch.equal(masks[a]["0"], masks[b]["0"])
    for arm in ARMS[1:]:
        fresh = [float(values(seen[arm, round])[0]) for round in range(4)]
        whole = [set(values(seen[arm, round]).tolist()) for round in range(4)]
        assert len(set(fresh)) == 4 and not whole[0] & whole[1] and not whole[1] & whole[2]
        assert not whole[1] & set(values(seen["ticket", 0]).tolist())
    for arm in ARMS:
        for round in range(3):
            before, after = seen[arm, round][2], seen[arm, round + 1][2]
            assert all((before[name] >= mask).all() for name, mask in after.items()), "masks are nested"


def test_random_masks_know_nothing_of_the_weights():
    found = go(chains(["random"]), rounds=1)
    _, snap, masks = found["random", 1]
    before = found["random", 0][1]["0.weight"].abs()
    assert float(before[masks["0"]].mean()) == pytest.approx(float(before.mean()), rel=0.1)


def test_reinit_chain_prunes_its_own_smallest_weights():
    chain = chains(["reinit-chain"])[0]
    finals = {}

    def score(context):
        finals[len(finals)] = context.final["0"].abs().clone()
        return {name: weight.abs() for name, weight in context.final.items()}

    chain.pruning["score"] = score
    seen = go([chain], rounds=2)
    for round, final in finals.items():
        before, after = seen["reinit-chain", round][2]["0"], seen["reinit-chain", round + 1][2]["0"]
        assert final[before & ~after].max() < final[after].min()
    assert len(finals) == 2, "the last round is not pruned"


def test_the_same_chain_again_and_another_trial():
    first, again, other = (go(chains(trial=trial)) for trial in (0, 0, 1))
    for key, found in first.items():
        assert torch.equal(values(found), values(again[key])) and found[0].seed == again[key][0].seed
        assert not set(values(found).tolist()) & set(values(other[key]).tolist())
    orders = [found[0].seed for seen in (first, other) for found in seen.values()]
    assert len(set(orders)) == len(orders), "every ticket has an order of the data of its own"


def test_rewinding_to_a_later_iteration():
    seen = go(chains(["ticket", "reinit"], rewind=5))
    assert {key: (t.start, t.keep_at) for key, (t, _, _) in seen.items() if t.start or t.keep_at} == {
        ("ticket", 0): (0, 5)
    } | {("ticket", round): (5, None) for round in (1, 2, 3)}
    first, later = values(seen["ticket", 0], seen["ticket", 1][2]), values(seen["ticket", 1])
    assert not torch.equal(first, later), "not the values of the beginning"
    assert torch.equal(values(seen["ticket", 3]), values(seen["ticket", 1], seen["ticket", 3][2]))


@pytest.mark.parametrize("pruning, status", [({"rate": 0.99}, "done"), ({}, "diverged")])
def test_an_arm_that_ends_early_takes_its_followers_along(pruning, status):
    given = chains(["ticket", "reinit"], **pruning)
    seen = go(given, status=status)
    last = 1 if status == "done" else 0  # 80 weights of the output layer: 1 left, then none
    assert set(seen) == {(arm, round) for arm in ("ticket", "reinit") for round in range(last + 1)}
    assert given[0].status == ("collapsed" if status == "done" else "diverged")
    assert given[0].finished[last]["kept"]["3"] == [1 if last else 80, 80]


def test_scores_see_the_best_weights():
    chain, seen = chains(["ticket"])[0], []

    def score(context):
        seen.append(torch.equal(context.need("best")["3"], context.final["3"]))
        return context.final

    chain.pruning["score"] = score
    go([chain], rounds=1)
    assert seen == [True]


WEIGHTS = ("0", "3")  # the masked layers of `small`, 320 and 80 weights
OWN = [name for name, arm in arms.ARMS.items() if not arm.masks_of]


def initial(seed=7):
    """The values that every arm but the fresh ones begins with."""
    return lth.snapshot(Chain(small(), seed).draw_())


def pruned(chain, values, masks, rounds, **more):
    """The masks of a network with these values after `prune_` as the chain calls it following each of `rounds`."""
    model = lth.rewind_(small(), values)
    lth.set_masks_(model, masks)
    lth.rewind_(model, values)
    for round in rounds:
        lth.prune_(model, **{"rate": 0.5, "generator": chain.generator("ties", round)} | more)
    return get_masks(model)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def masked(snap, masks):
    return merged(masks, snap, {name: torch.zeros_like(tensor) for name, tensor in snap.items()})


@pytest.mark.parametrize("first", ["ticket", "one-shot", "snip-at-start", "redraw"])
@pytest.mark.parametrize("rewind", [0, 5])
def test_arms_that_share_the_dense_round_train_it_once(first, rewind):
    same = ("ticket", "one-shot", "keep", "freeze", "redraw", "units", "snip-at-start", "constant-sign", "stability")
    names = [first, *(name for name in same if name != first)]
    if first != "ticket":
        names.remove("constant-sign")
    trained, results = [], {}

    def train(tickets):
        trained.append([ticket.label for ticket in tickets])
        for ticket in tickets:
            assert (
                equal(lth.snapshot(ticket.model), initial())
                or "reinit" in ticket.label
                or "round_00" not in ticket.label
            )
        found = []
        for ticket in tickets:
            with torch.no_grad():
                for weight in masked_weights(ticket.model):
                    weight.parameter.mul_(2)
            now = lth.snapshot(ticket.model)
            found.append(Result(best=now, kept=now if ticket.keep_at else {}))
        return found

    given = chains([*names, "reinit-chain", "sibling"], rewind=rewind)
    dense = {}
    for chain in given:
        chain.advance = lambda *a, chain=chain, advance=chain.advance: (
            dense.setdefault(chain.arm, lth.snapshot(chain.model)),
            advance(*a),
        )
    search(given, train, 1, lambda chain, round, result: results.setdefault((chain.arm, round), result))
    assert trained[0] == [f"{name}/trial_0/round_00" for name in (first, "reinit-chain", "sibling")]
    assert len(trained[1]) == len(given)
    assert all(results[name, 0] is results[first, 0] and equal(dense[name], dense[first]) for name in names)
    doubled = {
        name: 2 * tensor if name.endswith("weight") and name[0] in WEIGHTS else tensor
        for name, tensor in initial().items()
    }
    assert equal(dense[first], doubled)
    assert all(chain.finished[0]["density"] == 1 for chain in given)


def test_a_network_to_begin_with_is_not_shared():
    given = chains(["ticket", "one-shot"])
    given[0].initial = {name: tensor + 1 for name, tensor in initial().items()}
    seen = go(given, rounds=1)
    assert equal(seen["ticket", 0][1], given[0].initial) and equal(seen["one-shot", 0][1], initial())
    assert equal(seen["ticket", 1][1], masked(given[0].initial, seen["ticket", 1][2]))


@pytest.mark.parametrize("name", OWN)
def test_masks_of_every_arm_that_makes_its_own(name):
    (chain,) = given = chains([name])
    seen = go(given, rounds=2)
    counts = [sum(int(mask.sum()) for mask in seen[name, round][2].values()) for round in range(3)]
    if name == "units":  # half of the 20 hidden units, and again
        assert counts == [400, 10 * 16 + 10 * 4, 5 * 16 + 5 * 4]
    else:
        # what is best here is what training left, so that to `stability` no weight is less stable than another
        wanted = [400] * 3 if name in ("redraw", "stability") else [400, 200, 100]
        assert counts == pytest.approx(wanted, abs=arms.ARMS[name].substeps - 1), "each step rounds"
    for round in range(3):
        _, snap, masks = seen[name, round]
        assert not any(snap[f"{layer}.weight"][~mask].any() for layer, mask in masks.items())
        later = seen[name, min(round + 1, 2)][2]
        assert all((mask >= later[layer]).all() for layer, mask in masks.items()), "masks are nested"


def test_one_shot_prunes_the_dense_weights_again_and_again():
    (chain,) = given = chains(["one-shot"])
    seen = go(given)
    for round in range(1, 4):
        dense = {name: torch.ones_like(mask) for name, mask in seen["one-shot", 0][2].items()}
        assert equal(seen["one-shot", round][2], pruned(chain, chain.ends[0], dense, range(round)))
        assert equal(seen["one-shot", round][1], masked(initial(), seen["one-shot", round][2]))


@pytest.mark.parametrize("name, substeps", [("snip-at-start", 1), ("synflow-at-start", 10)])
def test_masks_made_before_training(name, substeps):
    (chain,) = given = chains([name])
    seen = go(given, rounds=2)
    assert equal(seen[name, 0][1], initial()), "the dense network is whole, though its masks are made already"
    model, start = small(), {key[:1]: tensor for key, tensor in initial().items() if key in ("0.weight", "3.weight")}
    lth.rewind_(model, initial())
    for round in range(2):
        generator = chain.generator("ties", round)
        for _ in range(substeps):
            rate = 1 - 0.5 ** (1 / substeps)
            lth.prune_(model, rate, score=arms.ARMS[name].score, generator=generator, batches=images(), initial=start)
        assert equal(seen[name, round + 1][2], get_masks(model))
        assert equal(seen[name, round + 1][1], masked(initial(), get_masks(model)))


@pytest.mark.parametrize("name", ["keep", "lr-rewind"])
def test_kept_weights_go_on_from_where_training_left_them(name):
    (chain,) = given = chains([name], rewind=5)
    seen = go(given)
    for round in range(1, 4):
        ticket, snap, masks = seen[name, round]
        assert equal(snap, masked(chain.ends[round - 1], masks))
        assert equal(masks, pruned(chain, chain.ends[round - 1], seen[name, round - 1][2], [round - 1]))
        assert (ticket.start, ticket.fine_tune) == ((0, True) if name == "keep" else (5, False))
    assert not seen[name, 0][0].fine_tune and seen[name, 0][0].keep_at == 5


def test_only_keep_is_fine_tuned():
    assert [name for name, arm in arms.ARMS.items() if arm.fine_tunes] == ["keep"]
    seen = go(chains(list(arms.ARMS)), rounds=1)
    assert [arm for (arm, _), (ticket, _, _) in seen.items() if ticket.fine_tune] == ["keep"]


@pytest.mark.parametrize("rewind", [0, 5])
def test_pruned_weights_are_frozen_at_their_initial_values(rewind):
    (chain,) = given = chains(["freeze"], rewind=rewind)
    seen = go(given)
    start = chain.ends[0] if rewind else initial()  # `go` keeps the values of the end for those of iteration 5
    for round in range(1, 4):
        _, snap, masks = seen["freeze", round]
        assert equal(snap, masked(start, masks))
        wanted = {layer: start[f"{layer}.weight"] * ~mask for layer, mask in masks.items()}
        assert equal(chain.frozen[round], wanted)
    assert chain.frozen[0] == {} and set(chain.carried) == {2, 3}, "those of earlier rounds are given up"


def test_weights_that_went_toward_zero_are_frozen_or_begin_at_zero():
    name = "freeze-zero-toward-all"
    (chain,) = given = chains([name])
    seen, start = go(given, rounds=2), initial()
    gone = {layer: torch.zeros_like(mask) for layer, mask in seen[name, 0][2].items()}
    last = {layer: chain.ends[0][f"{layer}.weight"] for layer in WEIGHTS}
    for round in (1, 2):
        _, snap, masks = seen[name, round]
        for layer, mask in masks.items():
            begin = start[f"{layer}.weight"]
            away = torch.where(last[layer].abs() < begin.abs(), 0, begin)
            assert torch.equal(snap[f"{layer}.weight"], away * mask)
            assert torch.equal(chain.frozen[round][layer], away * ~mask)
            assert (away[mask] == 0).any() and (away[mask] != 0).any() and (~mask > gone[layer]).any()
            gone[layer] = ~mask
            last[layer] = chain.ends[round][f"{layer}.weight"] + chain.frozen[round][layer]


def test_redraw_keeps_all_and_changes_what_would_have_gone():
    (chain,) = given = chains(["redraw"])
    seen = go(given, rounds=2)
    for round, rate in enumerate([0.5, 0.25]):
        before, after = seen["redraw", round][1], seen["redraw", round + 1][1]
        dense = seen["redraw", round][2]
        assert all(mask.all() for mask in dense.values())
        stay = pruned(chain, chain.ends[round], dense, [round], rate=rate)
        for layer, mask in stay.items():
            assert torch.equal(before[f"{layer}.weight"] == after[f"{layer}.weight"], mask)
            assert int((~mask).sum()) == rate * mask.numel()
        assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("bias"))


def test_what_a_round_started_from_is_known_until_it_is_recorded():
    (chain,) = given = chains(["redraw"])
    starts = []
    search(given, lambda tickets: [Result() for _ in tickets], 1, lambda chain, *_: starts.append(dict(chain.start)))
    assert equal(starts[0], initial()) and not equal(starts[1], initial())


def test_union_and_intersection_of_two_siblings():
    given = chains(["ticket", "sibling", "union", "intersection"])
    seen = go(given)
    for round in range(4):
        a, b, either, both = (
            seen[name, round][2] if (name, round) in seen else get_masks(small())
            for name in ("ticket", "sibling", "union", "intersection")
        )
        for layer in WEIGHTS:
            assert torch.equal(either[layer], a[layer] | b[layer]) and torch.equal(both[layer], a[layer] & b[layer])
            assert round == 0 or not torch.equal(a[layer], b[layer])
        for name in ("sibling", "union", "intersection") if round else ():
            ticket, snap, masks = seen[name, round]
            assert equal(snap, masked(initial(), masks))
            assert (ticket.seed == seen["ticket", round][0].seed) == (name != "sibling")


@pytest.mark.parametrize("rewind", [0, 5])
def test_a_twin_sees_the_data_in_another_order(rewind):
    seen = go(chains(["ticket", "twin"], rewind=rewind))
    for round in range(4):
        (ticket, a, masks), (twin, b, others) = seen["ticket", round], seen["twin", round]
        assert equal(a, b) and equal(masks, others)
        assert ticket.seed != twin.seed and (ticket.start, ticket.keep_at) == (twin.start, twin.keep_at)


def test_constants_of_the_initial_signs():
    seen = go(chains(["ticket", "constant-sign"]), rounds=1)
    _, snap, masks = seen["constant-sign", 1]
    assert equal(masks, seen["ticket", 1][2])
    for layer, mask in masks.items():
        begin = initial()[f"{layer}.weight"]
        wanted = begin.double().std(correction=0).float() * begin.sign() * mask
        torch.testing.assert_close(snap[f"{layer}.weight"], wanted)


def test_merged():
    a, b = ({"0.weight": value + torch.zeros(2), "0.bias": value + torch.zeros(2)} for value in (1.0, 2.0))
    found = merged({"0": torch.tensor([True, False])}, a, b)
    assert found["0.weight"].tolist() == [1, 2] and found["0.bias"].tolist() == [1, 1]


def test_an_arm_whose_one_shot_empties_a_layer_collapses_when_it_gets_there():
    (chain,) = given = chains(["one-shot"], rate=0.9)
    seen = go(given, rounds=4)
    assert [sum(int(mask.sum()) for mask in masks.values()) for _, _, masks in seen.values()] == [400, 40, 4]
    assert chain.status == "collapsed" and set(chain.masks) == {0, 1, 2}
