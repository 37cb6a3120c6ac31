"""Recipes: the paper's values, spellings, steps, refusals of one sentence, and identity."""

from dataclasses import asdict, fields, replace

import pytest
import torch

from lth_sparse.recipe import Recipe, parse, steps

FIXED = {"device": "cpu", "threads": 1}
LENET_MNIST = "66f582fe"  # changes only when the meaning of a run does: every run folder carries it


def refusal(call, *args, **kwargs) -> str:
    """The message of the ValueError, which is one sentence."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    message = str(caught.value)
    assert message and "\n" not in message and not message.endswith(".") and "Traceback" not in message
    return message


@pytest.mark.parametrize(
    "model, dataset, optimizer, lr, batch, iterations, fc, conv, scope",
    [
        ("lenet-300-100", "mnist", "adam", 1.2e-3, 60, 50_000, 0.2, 0.0, "layer"),
        ("conv-2", "cifar10", "adam", 2e-4, 60, 20_000, 0.2, 0.1, "layer"),
        ("conv-4", "cifar10", "adam", 3e-4, 60, 25_000, 0.2, 0.1, "layer"),
        ("conv-6", "cifar10", "adam", 3e-4, 60, 30_000, 0.2, 0.15, "layer"),
        ("resnet-18", "cifar10", "sgd", 0.1, 128, 30_000, 0.0, 0.2, "global"),
        ("vgg-19", "cifar10", "sgd", 0.1, 64, 112_000, 0.0, 0.2, "global"),
    ],
)
def test_defaults_are_the_papers(model, dataset, optimizer, lr, batch, iterations, fc, conv, scope):
    found = Recipe(model=model, dataset=dataset, **FIXED).resolve(45_000)
    assert (found.optimizer, found.lr, found.batch_size, found.iterations) == (optimizer, lr, batch, iterations)
    assert (found.prune_rate_fc, found.prune_rate_conv, found.scope) == (fc, conv, scope)
    assert (found.rounds, found.evaluate_every, found.rewind, found.score) == (20, 100, 0, "magnitude")
    deep = {"resnet-18": (20_000, 25_000), "vgg-19": (56_000, 84_000)}
    assert found.milestones == deep.get(model, ())
    assert (found.momentum, found.weight_decay) == (0.9, 1e-4 if model in deep else 0.0)


def test_digits_have_their_own_scale_and_what_is_given_stays():
    assert (Recipe(dataset="digits").rounds, Recipe(dataset="digits").iterations) == (8, "2000")
    given = Recipe(dataset="digits", rounds=3, lr=0.5, weight_decay=0.25, milestones=("7",), optimizer="sgd")
    assert (given.rounds, given.lr, given.weight_decay, given.milestones) == (3, 0.5, 0.25, ("7",))


@pytest.mark.parametrize(
    "given, meant",
    [("lenet300100", "lenet-300-100"), ("LeNet_300_100", "lenet-300-100"), ("conv2", "conv-2"), ("VGG19", "vgg-19")],
)
def test_spellings(given, meant):
    assert parse({"model": given, "dataset": "fashion_mnist", "scope": None}).model == meant
    assert parse({"model": given, "dataset": "fashion_mnist"}).dataset == "fashion-mnist"


@pytest.mark.parametrize(
    "given, meant",
    [
        ("500", 500),
        (500, 500),
        (" 26ep ", 2600),
        ("0.5ep", 50),
        ("0.02", 20),
        (0.02, 20),
        ("0", 0),
        ("9" * 9, 10**9 - 1),
    ],
)
def test_steps(given, meant):
    assert steps("rewind", given, epoch=100, whole=1000) == meant


@pytest.mark.parametrize("given", ["-1", "-2ep", "nan", "nanep", "inf", "1e400ep", "9" * 5000, "ep", "", "1e9", "1.5"])
def test_steps_refused(given):
    assert repr(given) in refusal(steps, "warmup", given, 100, 1000)


def test_a_fraction_is_of_the_training_only_where_there_is_one():
    assert "iterations" in refusal(steps, "iterations", "0.5", 100)


def test_resolve_makes_numbers_and_once_is_enough():
    counts = dict(iterations="2ep", rewind="0.1", warmup="10", evaluate_every="1ep", milestones=("0.5", "1ep"))
    given = Recipe(**counts, **FIXED)
    found = given.resolve(6000)
    assert (found.iterations, found.rewind, found.warmup, found.evaluate_every) == (200, 20, 10, 100)
    assert found.milestones == (100, 100)
    assert found.resolve(6000) == found and found.resolve(6000).identity() == found.identity()
    assert Recipe(device="cpu").resolve(6000).threads >= 1


@pytest.mark.parametrize(
    "settings",
    [
        *({name: value} for name in ("prune_rate_fc", "prune_rate_conv") for value in (1, 1.5, -0.1, "nan", "inf")),
        {"prune_rate_fc": 0},
        {"model": "conv-2", "prune_rate_fc": 0, "prune_rate_conv": 0},
        {"model": "resnet-18", "prune_rate_conv": 0, "prune_rate_fc": 0.2},  # its only Linear is kept whole
        *({"rounds": value} for value in (-1, 201, 1.5, "nan", "", "many")),
        *({"trials": value} for value in (0, 1001)),
        *({"batch_size": value} for value in (0, -60, 2**21)),
        *({name: value} for name in ("lr", "momentum", "weight_decay") for value in ("nan", "inf", -1, "fast")),
        {"lr": 0},
        *({"threads": value} for value in (-1, 1025)),
        *({"seed": value} for value in (-1, 2**63, 0.5)),
        *({"arms": value} for value in ("", "ticket,best", "ticket,ticket", "reinit", 5)),
        *({name: "best"} for name in ("model", "dataset", "score", "scope", "optimizer", "normalization")),
        *({name: "best"} for name in ("activation", "precision", "device")),
        {"precision": "tf32", "device": "cpu"},
        {"learning_rate": 0.1},
        *({"dropout": value} for value in (1, -0.1, "nan")),
        *({"final_density": value} for value in (1, -0.1)),
        {"perturbation": "inf"},
        {"arms": "union,ticket"},
        {"tickets_of": "runs/mine", "arms": "ticket,random"},
        *({name: "best"} for name in ("loss", "images")),
    ],
    ids=str,
)
def test_settings_refused(settings):
    message = refusal(parse, settings)
    assert any(word in message for word in (*settings, *(name.replace("_", " ") for name in settings)))


@pytest.mark.parametrize(
    "settings",
    [
        *({"iterations": value} for value in ("0", "-5", "0.001ep", "0.5", "soon")),
        *({"evaluate_every": value} for value in ("0", "101", "2ep", "-1")),
        *({"rewind": value} for value in ("100", "-1", "1.0")),
        {"warmup": "101"},
        *({"milestones": value} for value in ("a,b", "50,-1", "nan")),
        {"batch_size": 6001},
    ],
    ids=str,
)
def test_resolve_refuses(settings):
    given = parse({"iterations": "100", **FIXED} | settings)
    assert next(iter(settings)) in refusal(given.resolve, 6000)


def test_cuda_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "CUDA" in refusal(Recipe, device="cuda")
    assert Recipe(device="auto").device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert Recipe(device="auto", precision="tf32").device == "cuda"


def test_identity_is_pinned():
    assert Recipe(**FIXED).resolve(55_000).identity() == LENET_MNIST


def test_options_that_are_off_are_no_part_of_it():
    off = dict(dropout=0.0, loss="cross-entropy", exclude=(), tickets_of="", final_density=0.0)
    assert Recipe(**FIXED, **off).resolve(55_000).identity() == LENET_MNIST
    assert not set(off) & set(Recipe(**FIXED).settings()) and Recipe(dropout=0.5, **FIXED).settings()["dropout"] == 0.5


@pytest.mark.parametrize(
    "settings, meant",
    [({"itertions": 3}, "'iterations'"), ({"optimizer": "adamm"}, "'adam'"), ({"arms": "ticket,reinitt"}, "'reinit'")],
)
def test_the_nearest_valid_name_is_told(settings, meant):
    assert f"did you mean {meant}" in refusal(parse, settings)


def test_identity_changes_with_every_field():
    base = Recipe(model="conv-2", dataset="cifar10", **FIXED).resolve(45_000)
    other = dict(model="conv-4", dataset="mnist", arms=("ticket",), scope="global", optimizer="sgd", milestones=(7,))
    other |= dict(normalization="half", activation="tanh", precision="bf16", score="random", validation_size=7)
    seen = {base.identity()}
    for field in fields(Recipe):
        changed = replace(base)
        object.__setattr__(changed, field.name, other.get(field.name, 7))
        assert asdict(changed) != asdict(base), field.name
        seen.add(changed.identity())
    assert len(seen) == len(fields(Recipe)) + 1
    assert all(len(identity) == 8 and int(identity, 16) >= 0 for identity in seen)


@pytest.mark.parametrize("given, meant", [("", ""), ("26ep", 2600), ("300", 300), ("0.5ep", 50)])
def test_steps_of_the_first_round(given, meant):
    found = Recipe(iterations="40", evaluate_every="10", first_iterations=given, **FIXED).resolve(6000)
    assert (found.first_iterations, found.iterations) == (meant, 40) and found.resolve(6000) == found


@pytest.mark.parametrize("given", ["0", "10", "soon", "0.5"])
def test_a_first_round_that_does_not_reach_the_rewinding_is_refused(given):
    asked = Recipe(iterations="40", evaluate_every="10", rewind="10", first_iterations=given, **FIXED)
    assert "first_iterations" in refusal(asked.resolve, 6000)
    assert (
        Recipe(iterations="40", evaluate_every="10", rewind="10", first_iterations="11", **FIXED)
        .resolve(6000)
        .first_iterations
        == 11
    )


def test_lists_and_words_of_options():
    found = parse({"exclude": "output, conv1", "loss": "squared_error", "images": "grey28", "arms": "ticket,keep"})
    assert (found.exclude, found.loss, found.images) == (("output", "conv1"), "squared-error", "grey-28")
    assert parse({"exclude": ["output"]}).exclude == ("output",) and parse({"untrained": "1"}).untrained == 1


@pytest.mark.parametrize("arm", ["reinit", "twin", "union", "constant-sign", "one-shot-reinit"])
def test_arms_that_take_masks_need_whom_to_take_them_from(arm):
    assert f"the arm {arm!r} takes the masks of the arm" in refusal(Recipe, arms=(arm,))


def test_with_tickets_of_another_run_no_arm_makes_masks():
    assert "'sibling' makes its own" in refusal(Recipe, tickets_of="first", arms=("ticket", "sibling"))
    arms = ("ticket", "reinit", "twin", "constant-sign")
    assert Recipe(tickets_of="first", arms=arms).settings()["tickets_of"] == "first"
