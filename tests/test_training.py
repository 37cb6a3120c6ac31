"""The engine: nothing off the mask, same identity same bits, resumable at every step, histories as promised."""

import copy
import math
import threading

import pytest
import torch
import torch.nn.functional as F

import lth_sparse as lth
from lth_sparse import models, training
from lth_sparse.checkpoint import read_tensors
from lth_sparse.data import Data, Split
from lth_sparse.masks import masked_weights
from lth_sparse.recipe import Recipe
from lth_sparse.training import Result, Ticket, evaluate, learning_rate, train

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

    return Data("tiny", split(size), split(20), split(25), shape, 10, "unit")


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
    step = training._Training._step

    def stepping(self):
        if self.iteration == iteration:
            raise Stop
        if steps is not None:
            steps.append(self.iteration)
        step(self)

    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
    monkeypatch.setattr(training._Training, "_step", stepping)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_nothing_off_the_mask_is_ever_non_zero(monkeypatch, name):
    data, step, seen = tiny(), training._Training._step, []

    def stepping(self):
        before = self.model.fc1.weight.detach().clone()
        step(self)
        state = self.optimizer.state
        for weight in masked_weights(self.model):
            off = ~weight.mask
            tensors = [weight.parameter, *(t for t in state[weight.parameter].values() if getattr(t, "ndim", 0) == 2)]
            assert not any(tensor[off].count_nonzero() for tensor in tensors)
        seen.append(not torch.equal(before, self.model.fc1.weight))

    monkeypatch.setattr(training._Training, "_step", stepping)
    given = ticket(data)
    train([given], data, settings(**OPTIMIZERS[name]))
    assert len(seen) == 20 and all(seen) and lth.density(given.model) == 0.5


def test_each_ticket_gets_a_fresh_optimizer(monkeypatch):
    data, made, make = tiny(), [], training.make_optimizer

    def making(model, recipe):
        made.append(make(model, recipe))
        assert not made[-1].state
        return made[-1]

    monkeypatch.setattr(training, "make_optimizer", making)
    given = ticket(data)
    start = lth.snapshot(given.model)
    first = bits(given, train([given], data, settings())[0])
    lth.rewind_(given.model, start)
    assert bits(given, train([given], data, settings())[0]) == first
    assert len({id(optimizer) for optimizer in made}) == 2 and made[0].state
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
    order = training._Order(size, batch, 3, "cpu")
    batches = [order.batch(iteration) for iteration in range(6 * size)]
    epochs = torch.cat(batches).split(size)
    assert len(epochs) == 6 * batch and all(len(b) == batch for b in batches)
    assert all(epoch.sort().values.tolist() == list(range(size)) for epoch in epochs)
    assert size == 1 or len({tuple(epoch.tolist()) for epoch in epochs}) > 1
    assert torch.equal(training._Order(size, batch, 3, "cpu").batch(5 * size - 1), batches[5 * size - 1])
    assert not torch.equal(torch.cat([training._Order(100, 9, 4, "cpu").batch(i) for i in range(3)]), torch.arange(27))


@pytest.mark.parametrize("model, shape, size", [("lenet-300-100", (1, 4, 4), 2300), ("resnet-18", (1, 8, 8), 30)])
def test_evaluate_is_the_plain_mean(model, shape, size):
    data = tiny(size, shape)
    network = ticket(data, model=model).model.train()
    network(data.train.images[:20])  # batch norm has statistics of its own now
    before = lth.snapshot(network)
    loss, accuracy = evaluate(network, data.train, settings())
    assert network.training and all(torch.equal(before[name], t) for name, t in lth.snapshot(network).items())
    logits = copy.deepcopy(network).double().eval()(data.train.images.double()).detach()
    assert loss == pytest.approx(float(F.cross_entropy(logits, data.train.labels)), rel=1e-5)
    assert accuracy == float((logits.argmax(1) == data.train.labels).double().mean())


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_divergence_ends_the_training(tmp_path, monkeypatch, optimizer):
    data, recipe = tiny(), settings(optimizer=optimizer, lr=1e20, iterations="500", warmup="0")
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)
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
    result = train([given], data, recipe, lambda _, row: at.update({row["iteration"]: lth.snapshot(given.model)}))[0]
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
    loss, _ = evaluate(given.model, data.train, settings())
    recipe = settings(lr=1e-9, batch_size=60)  # so slow that each step's loss is the loss at the start
    result = train([given], data, recipe, lambda label, row: seen.append((label, row)))[0]
    assert [row["iteration"] for row in result.history] == wanted
    assert [row["train_loss"] for row in result.history] == pytest.approx([loss] * len(wanted), rel=1e-4)
    assert seen == [(given.label, row) for row in result.history]
    names = ["train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy"]
    assert list(seen[0][1]) == ["iteration", *names] and {type(seen[0][1][name]) for name in names} == {float}
    assert result.train_accuracy == evaluate(given.model, data.train, recipe)[1] and result.seconds > 0


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
def test_a_failure_has_the_others_save(tmp_path, place):
    data, calls = tiny(), []
    tickets = [ticket(data, seed, folder=tmp_path / str(seed)) for seed in range(3)]
    for given in tickets:
        given.folder.mkdir()

    def fail(module, arguments):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("the device is gone")

    tickets[place].model.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        train(tickets, data, settings(iterations="1000000", evaluate_every="1000000"))
    others = [given.folder / "training.safetensors" for i, given in enumerate(tickets) if i != place]
    assert all(read_tensors(path)[1]["iteration"] > 0 for path in others)
    assert not list(tmp_path.rglob("*.part")) and threading.active_count() == 1


@pytest.mark.parametrize("where", ["wait", "make_optimizer"])
def test_an_interrupt_has_all_save(tmp_path, monkeypatch, where):
    data, made, make = tiny(), [], training.make_optimizer

    def interrupt(*arguments, **more):
        made.append(1)
        if where == "wait" or len(made) == 2:  # the second ticket is not there yet
            raise KeyboardInterrupt
        return make(*arguments)

    monkeypatch.setattr(training, where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        train([ticket(data, seed, folder=tmp_path) for seed in range(2)], data, settings(iterations="1000000"))
    assert (tmp_path / "training.safetensors").exists() and threading.active_count() == 1


def test_freed_memory_is_kept_where_malloc_can(monkeypatch):
    set_options = []

    class Glibc:
        def mallopt(self, option, value):
            set_options.append((option, value))

    for libc in (Glibc(), object()):
        monkeypatch.setattr("ctypes.CDLL", lambda name, libc=libc: libc)
        training.keep_freed_memory()
    assert set_options == [(-8, 1), (-3, 2**30), (-1, 2**31 - 1)]
