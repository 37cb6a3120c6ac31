"""The engine: nothing off the mask, same identity same bits, resumable at every step, histories as promised."""

import copy
import math
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import lth_sparse as lth
from lth_sparse import models, training
from lth_sparse.checkpoint import read_tensors
from lth_sparse.data import Data, Split
from lth_sparse.masks import masked_weights
from lth_sparse.recipe import Recipe
from lth_sparse.training import Result, Ticket, group, planning, train
from lth_sparse.training.network import Network
from lth_sparse.training.optimizer import learning_rate
from lth_sparse.training.order import Order
from lth_sparse.training.stack import Stack

ADAM, ADAMW = dict(optimizer="adam", lr=0.01), dict(optimizer="adamw", lr=0.01, weight_decay=0.1)
SGD = dict(optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0.01)
OPTIMIZERS = {"adam": ADAM, "adamw": ADAMW, "sgd": SGD, "sgd-plain": SGD | {"momentum": 0.0}}
OPTIMIZERS["sgd-schedule"] = SGD | {"warmup": "4", "milestones": ("8", "15")}


class Stop(Exception):
    """Stands for a kill."""


def tiny(size=60, shape=(1, 4, 4)) -> Data:
    """A few random images, labelled by the brightest of their first ten pixels."""
    generator = torch.Generator().manual_seed(0)

    def split(count):
        images = torch.rand(count, *shape, generator=generator)
        return Split(images, images.flatten(1)[:, :10].argmax(1))

    scale, shift = torch.ones(shape[0]), torch.zeros(shape[0])
    return Data("tiny", split(size), split(20), split(25), shape, 10, "unit", scale, shift)


def settings(size=60, **given) -> Recipe:
    given = dict(iterations="20", evaluate_every="6", batch_size=16) | ADAM | given
    return Recipe(dataset="digits", device="cpu", threads=1, **given).resolve(size)


def ticket(data, seed=0, model="lenet-300-100", label=None, **more) -> Ticket:
    """A half pruned ticket, the same for the same seed."""
    network = models.build(model, data.input_shape, 10, generator=torch.Generator().manual_seed(seed))
    network = lth.prune_(lth.sparsify_(network), 0.5)
    return Ticket(network, label or f"ticket/trial_{seed}/round_01", seed, **more)


def bits(given: Ticket, result: Result) -> dict:
    """All that training gave but the seconds, comparable with ==."""
    groups = {"final": lth.snapshot(given.model), "best": result.best, "kept": result.kept}
    tensors = {f"{group}/{name}": t.tolist() for group, named in groups.items() for name, t in named.items()}
    return tensors | {"history": result.history, "status": result.status, "accuracy": result.train_accuracy}


def stop_at(monkeypatch, iteration, steps=None):
    """Have every training saved at each step, and stopped before the step of `iteration`."""
    advance = group.Group._advance

    def advancing(self):
        if self.iteration == iteration:
            raise Stop
        if steps is not None:
            steps.append(self.iteration)
        advance(self)

    monkeypatch.setattr(group, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(group, "STEPS", 1)
    monkeypatch.setattr(group.Group, "_advance", advancing)


def evaluated(network, split, recipe=None, kind=Network):
    """Loss and accuracy as the engine finds them."""
    data = Data("tiny", split, split, split, split.images.shape[1:], 10, "unit")
    return kind([network], data, recipe or settings(), {}).evaluate(split)[0].tolist()


def trained(learner):
    """The parameters that hold weights, and their masks."""
    if isinstance(learner, Stack):
        return [(layer.values, layer.masks) for layer in learner.layers]
    return [(weight.parameter, weight.mask) for weight in masked_weights(learner.model)]


@pytest.mark.parametrize("threads, processes, wanted", [(1, None, 8), (1, "2", 4), (3, "2", 1), (1, "16", 1)])
def test_processes_of_one_machine_share_its_cores(monkeypatch, threads, processes, wanted):
    counts, turns = [], training.Turns
    monkeypatch.setattr(training.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(training, "Turns", lambda count: counts.append(count) or turns(count))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    data = tiny()
    train([ticket(data)], data, replace(settings(), threads=threads))
    assert counts == [wanted]


@pytest.mark.parametrize("model, shape", [("lenet-300-100", (1, 4, 4)), ("conv-2", (1, 4, 4))])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_off_the_mask_is_ever_non_zero(monkeypatch, name, model, shape):
    data, advance, seen = tiny(shape=shape), group.Group._advance, []
    given = ticket(data, model=model)
    masks = {weight.name + ".weight": weight.mask for weight in masked_weights(given.model)}

    def advancing(self):
        before = self.learner.dense(self.learner.tensors(), 0)
        advance(self)
        after = self.learner.dense(self.learner.tensors(), 0)
        assert not any(after[name][~mask].any() for name, mask in masks.items())
        for parameter, mask in trained(self.learner):
            tensors = [t for t in self.learner.optimizer.state[parameter].values() if t.shape == mask.shape]
            assert not any(tensor[~mask].any() for tensor in tensors)
        seen.append(not torch.equal(before["fc1.weight"], after["fc1.weight"]))

    monkeypatch.setattr(group, "STEPS", 1)
    monkeypatch.setattr(group.Group, "_advance", advancing)
    train([given], data, settings(model=model, **OPTIMIZERS[name]))
    assert len(seen) == 20 and all(seen) and lth.density(given.model) == 0.5
    assert not any(lth.snapshot(given.model)[name][~mask].any() for name, mask in masks.items())


def test_each_ticket_gets_a_fresh_optimizer():
    data, given = tiny(), ticket(tiny())
    start = lth.snapshot(given.model)
    first = bits(given, train([given], data, settings())[0])
    lth.rewind_(given.model, start)
    assert bits(given, train([given], data, settings())[0]) == first
    assert bits(given, train([given], data, settings())[0]) != first, "trained on, it would not be the same"


def test_alone_or_side_by_side_the_bits_are_the_same():
    data, recipe, threads = tiny(), settings(), torch.get_num_threads()
    alone = []
    for seed in range(5):
        one = ticket(data, seed)
        alone.append(bits(one, train([one], data, recipe)[0]))
    group = [ticket(data, seed) for seed in range(5)]
    assert [bits(*pair) for pair in zip(group, train(group, data, recipe), strict=True)] == alone
    assert len({str(found["history"]) for found in alone}) == 5
    assert torch.get_num_threads() == threads and train([], data, recipe) == []


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_bits(monkeypatch, tmp_path, name):
    data, recipe = tiny(), settings(**OPTIMIZERS[name])
    whole = ticket(data, keep_at=9)
    wanted = bits(whole, train([whole], data, recipe)[0])
    assert wanted["kept/fc1.weight"] != wanted["final/fc1.weight"]
    for iteration in (1, 6, 8, 9, 10, 19):
        folder, steps = tmp_path / str(iteration), []
        folder.mkdir()
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, iteration)
            train([ticket(data, keep_at=9, folder=folder)], data, recipe)
        with monkeypatch.context() as patch:
            stop_at(patch, None, steps)
            again = ticket(data, keep_at=9, folder=folder)
            assert bits(again, train([again], data, recipe)[0]) == wanted, f"stopped at {iteration}"
        assert steps == list(range(iteration, 20))
        assert bits(again, train([again], data, recipe)[0]) == wanted, "saved at the end"


def test_resumed_bits_with_batch_norm(monkeypatch, tmp_path):
    data, recipe = tiny(20, (1, 8, 8)), settings(20, **SGD, iterations="4", evaluate_every="2", batch_size=8)
    whole = ticket(data, model="resnet-18", start=1, keep_at=2)
    wanted = bits(whole, train([whole], data, recipe)[0])
    assert whole.model.bn1.num_batches_tracked == 3
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 3)
        train([ticket(data, model="resnet-18", start=1, keep_at=2, folder=tmp_path)], data, recipe)
    again = ticket(data, model="resnet-18", start=1, keep_at=2, folder=tmp_path)
    assert bits(again, train([again], data, recipe)[0]) == wanted


def test_learning_rate():
    recipe = settings(**SGD | {"lr": 0.5}, warmup="4", milestones=("10", "15"), iterations="20")
    rates = [learning_rate(recipe, iteration) for iteration in (0, 1, 3, 4, 9, 10, 14, 15, 19)]
    assert rates == pytest.approx([0.125, 0.25, 0.5, 0.5, 0.5, 0.05, 0.05, 0.005, 0.005])
    assert learning_rate(settings(lr=0.3), 10**6) == 0.3


@pytest.mark.parametrize("size, batch", [(10, 4), (10, 10), (7, 3), (5, 1)])
def test_order_leaves_no_image_out(size, batch):
    order = Order(size, batch, 3, "cpu")
    batches = [order.batches(iteration)[0] for iteration in range(6 * size)]
    assert torch.equal(torch.stack(batches[2:7]), Order(size, batch, 3, "cpu").batches(2, 5))
    epochs = torch.cat(batches).split(size)
    assert len(epochs) == 6 * batch and all(len(b) == batch for b in batches)
    assert all(epoch.sort().values.tolist() == list(range(size)) for epoch in epochs)
    assert size == 1 or len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    assert torch.equal(Order(size, batch, 3, "cpu").batches(5 * size - 1)[0], batches[5 * size - 1])
    assert not torch.equal(torch.cat([Order(100, 9, 4, "cpu").batches(i)[0] for i in range(3)]), torch.arange(27))


@pytest.mark.parametrize("model, shape, size", [("lenet-300-100", (1, 4, 4), 2300), ("resnet-18", (1, 8, 8), 30)])
def test_evaluate_is_the_plain_mean(model, shape, size):
    data = tiny(size, shape)
    network = ticket(data, model=model).model.train()
    network(data.train.images[:20])  # batch norm has statistics of its own now
    before = lth.snapshot(network)
    loss, accuracy = evaluated(network, data.train)
    if model == "lenet-300-100":
        assert evaluated(network, data.train, kind=Stack) == pytest.approx([loss, accuracy], rel=1e-6)
    assert network.training and all(torch.equal(before[name], t) for name, t in lth.snapshot(network).items())
    logits = copy.deepcopy(network).double().eval()(data.train.images.double()).detach()
    assert loss == pytest.approx(float(F.cross_entropy(logits, data.train.labels)), rel=1e-5)
    assert accuracy == float((logits.argmax(1) == data.train.labels).double().mean())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_divergence_ends_the_training(tmp_path, monkeypatch, optimizer):
    data, recipe = tiny(), settings(optimizer=optimizer, lr=1e20, iterations="500", warmup="0")
    monkeypatch.setattr(group, "SAVE_SECONDS", -1.0)
    result = train([ticket(data, folder=tmp_path)], data, recipe)[0]
    last = result.history[-1]
    assert result.status == "diverged" and last["iteration"] < 500
    assert not math.isfinite(last["train_loss"] + last["validation_loss"])
    assert all(tensor.isfinite().all() for tensor in result.best.values())
    again = train([ticket(data, folder=tmp_path)], data, recipe)[0]  # goes on from the state saved at its last step
    assert again.status == "diverged" and str(again.history) == str(result.history)


def test_best_are_the_weights_of_the_early_stop():
    data, at = tiny(), {}
    given = ticket(data)
    recipe = settings(iterations="60", evaluate_every="3")
    for last in range(3, 61, 3):
        shorter = ticket(data)
        train([shorter], data, replace(recipe, iterations=last))
        at[last] = lth.snapshot(shorter.model)
    result = train([given], data, recipe)[0]
    stop = result.early_stop["iteration"]
    assert 3 < stop < 60, "the validation loss shall have its minimum inside"
    assert result.early_stop["validation_loss"] == min(row["validation_loss"] for row in result.history)
    assert all(torch.equal(at[stop][name], tensor) for name, tensor in result.best.items())
    assert not torch.equal(result.best["fc1.weight"], given.model.fc1.weight)


def test_early_stop_is_the_first_minimum():
    losses = [math.nan, 0.5, 0.2, 0.3, 0.2, math.nan]
    history = [{"iteration": i, "validation_loss": loss} for i, loss in enumerate(losses)]
    assert Result(history).early_stop["iteration"] == 2
    assert Result(history[:1]).early_stop["iteration"] == 0


@pytest.mark.parametrize("start, wanted", [(0, [6, 12, 18, 20]), (12, [18, 20]), (17, [18, 20]), (19, [20])])
def test_history(start, wanted):
    data, seen = tiny(), []
    given = ticket(data, start=start)
    loss, _ = evaluated(given.model, data.train)
    recipe = settings(lr=1e-9, batch_size=60)  # so slow that each step's loss is the loss at the start
    result = train([given], data, recipe, lambda label, row: seen.append((label, row)))[0]
    assert [row["iteration"] for row in result.history] == wanted
    assert [row["train_loss"] for row in result.history] == pytest.approx([loss] * len(wanted), rel=1e-4)
    assert seen == [(given.label, row) for row in result.history]
    names = ["train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy"]
    assert list(seen[0][1]) == ["iteration", *names] and {type(seen[0][1][name]) for name in names} == {float}
    assert result.train_accuracy == evaluated(given.model, data.train)[1] and result.seconds > 0


def test_bf16_trains():
    data = tiny()
    given, other = ticket(data), ticket(data)
    result = train([given], data, settings(precision="bf16", iterations="60"))[0]
    train([other], data, settings(iterations="60"))
    assert result.history[-1]["train_loss"] < 0.7 * result.history[0]["train_loss"]
    assert given.model.fc1.weight.dtype == torch.float32
    assert not torch.equal(given.model.fc1.weight, other.model.fc1.weight)
    assert not any(weight.parameter[~weight.mask].any() for weight in masked_weights(given.model))


@pytest.mark.parametrize("place", [0, 2])
def test_a_failure_has_the_others_save(monkeypatch, tmp_path, place):
    data, calls = tiny(), {}
    tickets = [ticket(data, seed, folder=tmp_path / str(seed)) for seed in range(3)]
    for given in tickets:
        given.folder.mkdir()

    step = Stack.step

    def fail(self, indices, moves=None):
        calls[self] = calls.get(self, 0) + 1
        if calls[self] == 5 and self.models[0] is tickets[place].model:
            raise RuntimeError("the device is gone")
        step(self, indices)

    monkeypatch.setattr(Stack, "step", fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(tickets, data, settings(iterations="1000000", evaluate_every="1000000"))
    others = [given.folder / "training.safetensors" for i, given in enumerate(tickets) if i != place]
    assert all(read_tensors(path)[1]["iteration"] > 0 for path in others)
    assert not list(tmp_path.rglob("*.part")) and threading.active_count() == 1


@pytest.mark.parametrize("where", ["wait", "Group"])
def test_an_interrupt_has_all_save(tmp_path, monkeypatch, where):
    data, made, kind = tiny(), [], group.Group

    def interrupt(*arguments, **more):
        made.append(1)
        if where == "wait" or len(made) == 2:  # the second ticket is not there yet
            raise KeyboardInterrupt
        return kind(*arguments)

    monkeypatch.setattr(training, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train([ticket(data, seed, folder=tmp_path) for seed in range(2)], data, settings(iterations="1000000"))
    assert (tmp_path / "training.safetensors").exists() and threading.active_count() == 1


def together(monkeypatch):
    """Have tickets train together as they would on CUDA."""
    monkeypatch.setattr(planning, "_key", lambda ticket, number, recipe: "all")


def test_a_group_is_as_good_as_each_alone(monkeypatch, tmp_path):
    data, recipe = tiny(), settings()
    alone = [ticket(data, seed, keep_at=9) for seed in range(3)]
    results = train(alone, data, recipe)
    together(monkeypatch)
    group = [ticket(data, seed, keep_at=9, folder=tmp_path / str(seed)) for seed in range(3)]
    for given in group:
        given.folder.mkdir()
    for given, found, other, wanted in zip(group, train(group, data, recipe), alone, results, strict=True):
        assert found.how["group"] == 3 and wanted.how["group"] == 1
        for row, same in zip(found.history, wanted.history, strict=True):
            assert row == pytest.approx(same, rel=1e-3)
        pairs = [(lth.snapshot(given.model), lth.snapshot(other.model)), (found.best, wanted.best)]
        for mine, theirs in [*pairs, (found.kept, wanted.kept)]:
            assert mine.keys() == theirs.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-4)
    part = [ticket(data, 2, keep_at=9, folder=tmp_path / "2")]  # the others were recorded before a kill
    (again,) = train(part, data, recipe)
    assert again.history == found.history and all(torch.equal(again.best[name], t) for name, t in found.best.items())
    assert all(torch.equal(a, b) for a, b in zip(part[0].model.parameters(), given.model.parameters(), strict=True))


@pytest.mark.parametrize("place", [0, 1])
def test_one_that_diverges_leaves_the_others_alone(monkeypatch, place):
    data, recipe = tiny(), settings(**SGD)
    wanted = train([ticket(data, seed) for seed in range(3)], data, recipe)
    together(monkeypatch)
    group = [ticket(data, seed) for seed in range(3)]
    with torch.no_grad():
        group[place].model.fc1.weight.fill_(1e30)
    results = train(group, data, recipe)
    assert results[place].status == "diverged" and len(results[place].history) == 1 and results[place].best == {}
    for other in {0, 1, 2} - {place}:
        assert results[other].status == "done" and len(results[other].history) == 4
        for row, same in zip(results[other].history, wanted[other].history, strict=True):
            assert row == pytest.approx(same, rel=1e-3)
        assert all(tensor.isfinite().all() for tensor in lth.snapshot(group[other].model).values())


def test_a_group_too_large_for_the_device_is_halved(monkeypatch):
    data, run = tiny(), group.Group.run

    def running(self, *arguments):
        if len(self.tickets) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, *arguments)

    together(monkeypatch)
    monkeypatch.setattr(group.Group, "run", running)
    tickets = [ticket(data, seed) for seed in range(5)]
    results = train(tickets, data, settings())
    assert [result.how["group"] for result in results] == [2, 2, 1, 2, 2]
    monkeypatch.setattr(group.Group, "run", lambda self, *arguments: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    with pytest.raises(torch.OutOfMemoryError):
        train(tickets[:2], data, settings())


def test_strategies_are_fixed_before_the_first_step(monkeypatch, tmp_path):
    data, recipe = tiny(), settings(strategy="cpu")
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 3)
        train([ticket(data, folder=tmp_path)], data, recipe)
    monkeypatch.setattr(planning.stack, "strategies", None)  # not asked again
    (result,) = train([ticket(data, folder=tmp_path)], data, recipe)
    assert result.how["strategies"] == dict.fromkeys(("fc1", "fc2", "output"), "cpu")


@pytest.mark.parametrize("model, shape", [("lenet-300-100", (1, 4, 4)), ("conv-2", (1, 4, 4))])
def test_packed_is_as_good_as_masked(model, shape):
    data, found = tiny(shape=shape), {}
    for strategy in ("masked", "cpu"):
        given = ticket(data, model=model, keep_at=9)
        (found[strategy],) = train([given], data, settings(model=model, strategy=strategy))
        found[strategy].best["final"] = given.model.fc1.weight.detach()
        assert found[strategy].how["strategies"]["fc1"] == strategy
    for row, same in zip(found["cpu"].history, found["masked"].history, strict=True):
        assert row == pytest.approx(same, rel=1e-3)
    for name, tensor in found["masked"].best.items():
        torch.testing.assert_close(found["cpu"].best[name], tensor, rtol=1e-3, atol=1e-4)


def test_augmented_training_is_resumed_too(monkeypatch, tmp_path):
    data = tiny(20, (1, 8, 8))
    recipe = settings(20, iterations="8", evaluate_every="3", batch_size=8, augmentation="crop-flip")
    whole = ticket(data)
    wanted = bits(whole, train([whole], data, recipe)[0])
    plain = ticket(data)
    assert bits(plain, train([plain], data, replace(recipe, augmentation="none"))[0]) != wanted
    with monkeypatch.context() as patch, pytest.raises(Stop):
        stop_at(patch, 4)
        train([ticket(data, folder=tmp_path)], data, recipe)
    again = ticket(data, folder=tmp_path)
    assert bits(again, train([again], data, recipe)[0]) == wanted


def test_freed_memory_is_kept_where_malloc_can(monkeypatch):
    set_options = []

    class Glibc:
        def mallopt(self, option, value):
            set_options.append((option, value))

    for libc in (Glibc(), object()):
        monkeypatch.setattr("ctypes.CDLL", lambda name, libc=libc: libc)
        training.keep_freed_memory()
    assert set_options == [(-8, 1), (-3, 2**30), (-1, 2**31 - 1)]


OPTIONS = {
    "dropout": {"model": "conv-2", "dropout": 0.5},
    "squared-error": {"loss": "squared-error"},
    "radam": {"optimizer": "radam"},
    "perturbation": {"perturbation": 0.5},
}


def optional(data, name, **more):
    given = ticket(data, model=OPTIONS[name].get("model", "lenet-300-100"), **more)
    if name == "dropout":
        masks = lth.snapshot(given.model), lth.get_masks(given.model)
        given.model = lth.sparsify_(models.build("conv-2", data.input_shape, dropout=0.5))
        lth.set_masks_(given.model, masks[1])
        lth.rewind_(given.model, masks[0])
    return given


@pytest.mark.parametrize("name", OPTIONS)
def test_resumed_bits_with_options(monkeypatch, tmp_path, name):
    data, recipe = tiny(), settings(**{"iterations": "12"} | OPTIONS[name])
    whole = optional(data, name, keep_at=9)
    wanted = bits(whole, train([whole], data, recipe)[0])
    off = {option: getattr(Recipe(dataset="digits"), option) for option in ("loss", "optimizer", "perturbation")}
    plain = ticket(data, model=recipe.model, keep_at=9)
    assert bits(plain, train([plain], data, replace(recipe, **off))[0]) != wanted, "the option does something"
    others = [optional(data, name, keep_at=9), ticket(data, 1, model=recipe.model, keep_at=9)]
    assert bits(others[0], train(others, data, recipe)[0]) == wanted, "in whatever thread"
    for iteration in (4, 8, 11):
        folder = tmp_path / str(iteration)
        folder.mkdir()
        with monkeypatch.context() as patch, pytest.raises(Stop):
            stop_at(patch, iteration)
            train([optional(data, name, keep_at=9, folder=folder)], data, recipe)
        again = optional(data, name, keep_at=9, folder=folder)
        assert bits(again, train([again], data, recipe)[0]) == wanted, f"stopped at {iteration}"
    for weight in masked_weights(whole.model):
        assert not weight.parameter[~weight.mask].any() and not weight.mask.all()


def test_each_step_and_each_layer_drops_other_units(monkeypatch):
    data, seeds = tiny(), []
    forward = models.Dropout.forward

    def seen(self, x):
        if self.training:
            seeds.append(self.seed)
        return forward(self, x)

    monkeypatch.setattr(models.Dropout, "forward", seen)
    train([optional(data, "dropout", start=2)], data, settings(**OPTIONS["dropout"], iterations="6"))
    assert seeds == list(range(4, 12)), "two layers in the iterations 2 to 5 of seed 0"


def test_squared_error_is_the_distance_to_the_indicators():
    data = tiny()
    network = ticket(data).model
    logits = network(data.train.images).detach().double()
    wanted = (logits - F.one_hot(data.train.labels, 10)).square().sum(1).mean()
    loss, accuracy = evaluated(network, data.train, settings(loss="squared-error"))
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    assert accuracy == float((logits.argmax(1) == data.train.labels).double().mean())
    slow = settings(lr=1e-9, batch_size=60, loss="squared-error")
    given = Ticket(network, "ticket/trial_0/round_01", 0)
    assert train([given], data, slow)[0].history[0]["train_loss"] == pytest.approx(loss, rel=1e-4)


def test_radam_is_that_of_torch():
    data, recipe = tiny(), settings(optimizer="radam", lr=0.01, iterations="9", batch_size=60)
    given, model = ticket(data), ticket(data).model
    train([given], data, recipe)
    optimizer = torch.optim.RAdam(model.parameters(), lr=0.01)
    for _ in range(9):  # the whole set in each step: the order is that of additions only
        optimizer.zero_grad()
        F.cross_entropy(model(data.train.images), data.train.labels).backward()
        optimizer.step()
    for mine, wanted in zip(given.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine, wanted, rtol=1e-4, atol=1e-5)
