"""Steps by the launch: on the CPU one by one; capture stands in for itself, as no graph is to be had there."""

import pytest
import torch

from lth_sparse.training import graph
from lth_sparse.training.graph import STEPS, Steps


class Learner:
    """Notes the batches and learning rates of its steps."""

    def __init__(self):
        self.seen = []
        self.optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    def step(self, indices, moves):
        self.seen.append((indices.tolist(), moves, float(self.optimizer.param_groups[0]["lr"])))


def chunk(count, first=0):
    return torch.arange(first, first + count).view(count, 1, 1), None, [0.5 * (first + i) for i in range(count)]


def wanted(count):
    return [([[i]], None, 0.5 * i) for i in range(count)]


def test_on_the_cpu_every_step_is_taken():
    steps = Steps(learner := Learner(), cuda=False)
    steps.take(*chunk(STEPS))
    steps.take(*chunk(3, STEPS))
    assert learner.seen == wanted(STEPS + 3) and steps.captured == "there is no CUDA device"


def test_a_capture_that_fails_costs_no_step(monkeypatch, caplog):
    def fail(self):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(graph.Steps, "_capture", fail)
    steps = Steps(learner := Learner(), cuda=True)
    for first in range(0, 4 * STEPS, STEPS):
        steps.take(*chunk(STEPS, first))
    assert learner.seen == wanted(4 * STEPS) and len(caplog.records) == 1
    assert steps.captured == "capture failed: operation not permitted when stream is capturing"


def test_replays_get_the_batches_of_now(monkeypatch):
    class Graph:
        def replay(self):
            indices, _, rates = steps.given
            learner.seen += [(i.tolist(), None, float(rate)) for i, rate in zip(indices, rates, strict=True)]

    monkeypatch.setattr(graph.Steps, "_capture", lambda steps: setattr(steps, "graph", Graph()))
    steps, first = Steps(learner := Learner(), cuda=True), 0
    for count in (STEPS, STEPS, 3, STEPS):
        steps.take(*chunk(count, first))
        first += count
    assert learner.seen == wanted(first) and steps.captured is True


def test_a_learner_with_steps_of_its_own_gets_them_whole():
    class Whole:
        def steps(self, indices, rates):
            seen.append((indices.flatten().tolist(), rates))

    seen, steps = [], Steps(Whole(), cuda=True)
    for count in (STEPS, 3):
        steps.take(*chunk(count))
    assert seen == [(list(range(count)), [0.5 * i for i in range(count)]) for count in (STEPS, 3)]
    assert steps.captured == "many steps are one launch" and steps.graph is None


@pytest.mark.gpu
@pytest.mark.parametrize("model", ["lenet-300-100", "conv-2"])
def test_captured_steps_are_the_uncaptured_ones(model, monkeypatch):
    import lth_sparse as lth
    from lth_sparse import data, models, training
    from lth_sparse.recipe import Recipe

    loaded, found = data.load("digits", device="cuda"), {}
    recipe = Recipe(model, "digits", iterations="200", device="cuda").resolve(len(loaded.train.labels))
    for captured in (True, False):
        monkeypatch.setattr(graph, "STEPS", STEPS if captured else 10**9)  # no chunk is as long as that
        network = models.build(model, loaded.input_shape, 10, generator=torch.Generator().manual_seed(0))
        ticket = training.Ticket(lth.prune_(lth.sparsify_(network), 0.5), "ticket", 0)
        result = training.train([ticket], loaded, recipe)[0]
        assert result.how["captured"] is True
        found[captured] = lth.snapshot(network) | {"losses": torch.tensor([r["train_loss"] for r in result.history])}
    for name, tensor in found[True].items():
        torch.testing.assert_close(tensor, found[False][name], rtol=1e-3, atol=1e-4)
