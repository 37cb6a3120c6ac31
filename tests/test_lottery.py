"""Finding tickets: exact rewinds and counts around any training, and what the arms do between rounds."""

import pytest
import torch
from torch import nn

import lth_sparse as lth
from lth_sparse.lottery import Chain, find_ticket, search
from lth_sparse.masks import masked_weights
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
    rounds = find_ticket(model, lambda model: None, rounds=9, rate=0.9)
    assert [int(r.masks["0"].sum()) for r in rounds] == [12, 1]  # round(0.9) of the last one goes
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


def chains(arms=ARMS, trial=0, rewind=0, **pruning):
    leaders = {}
    for arm in arms:
        leader = (leaders["ticket"],) if arm == "reinit" else ()
        own = {"rate": 0.5, "score": "random" if arm == "random" else "magnitude"} | pruning
        leaders[arm] = Chain(small(), 7, arm, trial, own, leaders=leader, rewind=rewind)
    return list(leaders.values())


def go(given, rounds=3, status="done"):
    """Run `search` with noise for a training; (arm, round) -> (ticket, values at its start, masks)."""
    seen, recorded = {}, []

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
        kept = lth.snapshot(ticket.model) if ticket.keep_at is not None else {}
        return Result(best=lth.snapshot(ticket.model), kept=kept, status=status)

    search(given, train, rounds, lambda chain, round, result: recorded.append((chain.arm, round)))
    assert set(recorded) == set(seen) and len(recorded) == len(seen)
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
