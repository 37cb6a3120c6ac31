"""The same bits twice, and differences that are noticed."""

import json

import torch

from lth_sparse import cli, determinism


def test_same_bits(monkeypatch):
    runs_here = determinism.dispatch.runnable(torch.device("cpu"), torch.float32)
    assert {"masked", "cpu"} <= set(runs_here)  # in Triton's interpreter others can run too, within hours
    monkeypatch.setattr(determinism.dispatch, "runnable", lambda *arguments: ("masked", "cpu"))
    assert dict(determinism.check("cpu")) == {"masked": determinism.SAME, "cpu": determinism.SAME}


def test_a_difference_is_named(monkeypatch, capsys):
    train, calls = determinism.training.train, []

    def drifting(tickets, *arguments):
        found = train(tickets, *arguments)
        calls.append(1)
        if len(calls) % 2:
            tickets[0].model.fc2.bias.data[0] = torch.nextafter(tickets[0].model.fc2.bias.data[0], torch.tensor(9.0))
        return found

    monkeypatch.setattr(determinism.dispatch, "runnable", lambda *arguments: ("masked",))
    monkeypatch.setattr(determinism.training, "train", drifting)
    assert cli.main(["env", "--determinism", "--json"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"masked": "fc2.bias differ"} and err == "masked: fc2.bias differ\n"
