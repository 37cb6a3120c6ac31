"""Tickets as files: exact, small, deterministic; a damaged or foreign one is refused and changes nothing."""

import contextlib
import copy
import json

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

import lth_sparse as lth
from lth_sparse.checkpoint import read_tensors, write_tensors
from lth_sparse.masks import freeze_, get_masks, masked_weights


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 5), nn.Linear(5, 3))


def ticket(seed=0, rate=0.6):
    model = lth.prune_(lth.sparsify_(network(seed), exclude="4"), rate)
    with torch.no_grad():
        model[1].running_mean.normal_()
        model[4].weight[0, 0] = 0  # a zero of a layer without mask
    return model


def assert_same(a, b):
    states = a.state_dict(), b.state_dict()
    assert list(states[0]) == list(states[1])
    for name, value in states[0].items():
        assert value.dtype == states[1][name].dtype and torch.equal(value, states[1][name]), name
    assert [type(m) for m in a.modules()] == [type(m) for m in b.modules()]


@pytest.mark.parametrize("start", ["dense", "masked whole", "masked otherwise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_round_trip_is_exact(start, dtype, tmp_path):
    model = ticket().to(dtype)
    lth.save(model, tmp_path / "t")
    twin = network(1).to(dtype)
    if start != "dense":
        lth.sparsify_(twin, exclude="4" if start == "masked whole" else ())
    if start == "masked otherwise":
        lth.prune_(twin, 0.8)
    parameters = list(twin.parameters())
    assert lth.load_(twin, str(tmp_path / "t")) is twin
    assert all(p is q for p, q in zip(twin.parameters(), parameters, strict=True))
    if start == "masked otherwise":  # the last layer is masked, and the ticket keeps all of it
        assert twin[4].weight_mask.all()
        twin = lth.sparsify_(lth.densify_(twin), exclude="4")
        for i in (0, 3):
            twin[i].weight_mask.copy_(model[i].weight_mask)
    assert_same(twin, model)


def test_loaded_tickets_train_on_their_masks(tmp_path):
    lth.save(ticket(), tmp_path / "t")
    model = lth.load_(network(1), tmp_path / "t")
    optimizer = torch.optim.Adam(model.parameters())
    for _ in range(3):
        model(torch.ones(2, 1, 4, 4)).square().sum().backward()
        optimizer.step()
    assert all((weight.parameter[~weight.mask] == 0).all() for weight in masked_weights(model))
    assert lth.density(lth.prune_(model, 0.5)) == pytest.approx(0.2, abs=0.02)


def test_equal_models_give_equal_bytes(tmp_path):
    for name, model in (("a", ticket()), ("b", copy.deepcopy(ticket())), ("c", ticket(seed=1))):
        lth.save(model, tmp_path / name)
    a, b, c = ((tmp_path / name).read_bytes() for name in "abc")
    assert a == b != c and sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    lth.save(lth.load_(network(2), tmp_path / "a"), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == a


@pytest.mark.parametrize("values, kept_bytes", [(True, 4 * 2500), (False, 0)])
def test_size_is_that_of_what_is_kept(values, kept_bytes, tmp_path):
    model = lth.prune_(lth.sparsify_(nn.Linear(500, 100, bias=False)), 0.95)
    lth.save(model, tmp_path / "t", values=values)
    assert kept_bytes + 50_000 / 8 <= (tmp_path / "t").stat().st_size <= kept_bytes + 50_000 / 8 + 500


def test_readable_with_safetensors_alone(tmp_path):
    model = ticket()
    lth.save(model, tmp_path / "t")
    with safe_open(tmp_path / "t", "pt") as file:
        metadata = json.loads(file.metadata()["lth_sparse"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = {"0.weight": [3, 1, 3, 3], "3.weight": [5, 12]}
    assert metadata == {"checksum": metadata["checksum"], "format": "lth-ticket-1", "shapes": shapes}
    assert "0.weight" not in tensors and torch.equal(tensors["4.weight"], model[4].weight)
    for name, shape in metadata["shapes"].items():
        bits = tensors[name + ".bits"].tolist()
        flat, values = [], iter(tensors[name + ".values"].tolist())
        for i in range(torch.Size(shape).numel()):
            flat.append(next(values) if bits[i // 8] >> i % 8 & 1 else 0.0)
        assert flat == model.get_parameter(name).flatten().tolist() and next(values, None) is None


def frozen(model, value=2.0):
    return freeze_(model, {name: torch.full(mask.shape, value) for name, mask in get_masks(model).items()})


@pytest.mark.parametrize("start", ["dense", "masked", "frozen otherwise"])
def test_frozen_weights_are_saved_and_loaded(start, tmp_path):
    model, twin = frozen(ticket()), network(1)
    lth.save(model, tmp_path / "t")
    with safe_open(tmp_path / "t", "pt") as file:
        assert torch.equal(file.get_tensor("3.weight_frozen"), 2.0 * ~model[3].weight_mask)
    if start != "dense":
        lth.prune_(lth.sparsify_(twin, exclude="4"), 0.3)
    if start == "frozen otherwise":
        frozen(twin, 5.0)
    assert_same(lth.load_(twin, tmp_path / "t"), model)
    lth.save(ticket(), tmp_path / "t")
    assert_same(lth.load_(twin, tmp_path / "t"), ticket())  # which has nothing frozen


def test_masks_alone_leave_what_is_frozen_where_they_prune(tmp_path):
    lth.save(frozen(ticket()), tmp_path / "t", values=False)
    lth.save(ticket(), tmp_path / "u", values=False)
    assert (tmp_path / "t").read_bytes() == (tmp_path / "u").read_bytes()
    model = frozen(lth.prune_(lth.sparsify_(network(1), exclude="4"), 0.3))
    before = model[3].weight_frozen.clone()
    mask = lth.load_(model, tmp_path / "t")[3].weight_mask
    assert torch.equal(model[3].weight_frozen, before * ~mask) and model[3].weight_frozen.any()


def test_frozen_weights_of_another_model_are_refused_and_change_nothing(tmp_path):
    attention = lth.sparsify_(nn.MultiheadAttention(4, 2))
    lth.save(attention, tmp_path / "t")
    for path in ("in_proj_weight", "out_proj.weight"):
        tensors, metadata = read_tensors(tmp_path / "t")
        write_tensors(tmp_path / "u", tensors | {path + "_frozen": torch.ones(metadata["shapes"][path])}, metadata)
        for model in (nn.MultiheadAttention(4, 2), lth.sparsify_(nn.MultiheadAttention(4, 2))):
            before = copy.deepcopy(model)
            with pytest.raises(ValueError, match=f"has frozen weights for '{path}', but attention cannot have any$"):
                lth.load_(model, tmp_path / "u")
            assert_same(model, before)


def test_masks_alone_leave_the_kept_values(tmp_path):
    source, model = ticket(), network(1)
    before = lth.snapshot(model)
    lth.save(source, tmp_path / "t", values=False)
    lth.load_(model, tmp_path / "t")
    for name, value in lth.snapshot(model).items():
        mask = source.state_dict().get(name + "_mask", torch.ones((), dtype=torch.bool))
        assert torch.equal(value, before[name] * mask)
    assert lth.density(model) == lth.density(source)


def test_a_layer_pruned_empty_survives(tmp_path):
    model = lth.sparsify_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)))
    for weight in masked_weights(model):
        weight.set_mask_(torch.zeros_like(weight.mask))
    lth.save(model, tmp_path / "t")
    assert_same(lth.load_(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1)), tmp_path / "t"), model)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.attention = nn.MultiheadAttention(4, 2, kdim=3)
        self.embedding, self.output = nn.Embedding(4, 4), nn.Linear(4, 4)
        self.output.weight = self.embedding.weight  # not masked, and twice in the state dict


@pytest.mark.parametrize("values", [True, False])
def test_tied_weights_and_attention(values, tmp_path):
    model, twin = lth.prune_(lth.sparsify_(Tied()), 0.5), Tied()
    lth.save(model, tmp_path / "t", values=values)
    twin.load_state_dict(lth.densify_(copy.deepcopy(model)).state_dict())
    assert_same(lth.load_(twin, tmp_path / "t"), model)
    assert twin.first.weight is twin.second.weight
    owners = [{weight.name: len(weight.owners) for weight in masked_weights(m)} for m in (twin, model)]
    assert owners[0] == owners[1] and owners[0]["first"] == 2


class Own(nn.Linear):
    pass


OTHERS = {
    "wider": lambda: nn.Sequential(nn.Conv2d(1, 4, 3), *network()[1:]),
    "shorter": lambda: network()[:4],
    "longer": lambda: nn.Sequential(*network(), nn.Linear(3, 3)),
    "renamed": lambda: nn.Sequential(network()),
    "no bias": lambda: nn.Sequential(*network()[:4], nn.Linear(5, 3, bias=False)),
    "a subclass": lambda: nn.Sequential(*network()[:3], Own(12, 5), network()[4]),
    "masked, a subclass": lambda: lth.prune_(lth.sparsify_(OTHERS["a subclass"]()), 0.3),
}


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("other", OTHERS)
def test_another_models_ticket_is_refused_and_changes_nothing(other, values, tmp_path):
    lth.save(ticket(), tmp_path / "t", values=values)
    model = OTHERS[other]()
    before = copy.deepcopy(model)
    if not values and other in ("longer", "no bias", "shorter"):  # masks alone ask for the layers they name
        assert lth.density(lth.load_(model, tmp_path / "t")) == lth.density(ticket())
        return
    with pytest.raises(ValueError, match=r"^\S*/t (is of another model: '|has a mask for '3.weight', which)[^\n]*$"):
        lth.load_(model, tmp_path / "t")
    assert_same(model, before)


def test_a_mask_for_a_weight_that_an_outsider_holds_is_refused(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    lth.save(lth.prune_(lth.sparsify_(model, targets="1"), 0.5), tmp_path / "t")
    twin = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    twin[1].weight = twin[0].weight
    with pytest.raises(ValueError, match="has a mask for '1.weight', which cannot be masked"):
        lth.load_(twin, tmp_path / "t")
    assert type(twin[1]) is nn.Linear


def refused(path):
    """Whether `load_` refuses `path` in one sentence, leaving the model as it was."""
    model, before = network(1), network(1)
    try:
        lth.load_(model, path)
    except ValueError as error:
        assert "\n" not in str(error) and str(error).startswith(str(path))
        assert_same(model, before)
        return True
    assert_same(model, ticket())
    return False


def test_every_truncation_and_every_flipped_bit_of_the_header_is_refused(tmp_path):
    path = tmp_path / "t"
    lth.save(ticket(), path)
    whole = path.read_bytes()
    assert not refused(path)
    for length in {0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1, *range(0, len(whole), 199)}:
        path.write_bytes(whole[:length])
        assert refused(path)
    path.write_bytes(whole + b"\0")
    assert refused(path)
    header = 8 + int.from_bytes(whole[:8], "little")
    for i in range(0, 8 * header, 61):
        path.write_bytes(whole[: i // 8] + bytes([whole[i // 8] ^ 1 << i % 8]) + whole[i // 8 + 1 :])
        assert refused(path)


@pytest.mark.parametrize(
    "change",
    [
        lambda t, m: t.pop("3.weight.bits"),
        lambda t, m: t.pop("3.weight.values"),
        lambda t, m: t.update({"3.weight.values": torch.ones(3)}),
        lambda t, m: t.update({"3.weight.values": torch.ones(60)}),
        lambda t, m: t.update({"3.weight.bits": torch.ones(8)}),
        lambda t, m: t.update({"3.weight.bits": torch.ones(3, dtype=torch.uint8)}),
        lambda t, m: t["3.weight.bits"].bitwise_xor_(1),
        lambda t, m: t.update({"3.weight_frozen": torch.ones(3)}),
        lambda t, m: t.update({"4.weight_frozen": torch.ones(3, 5)}),
        lambda t, m: m["shapes"].update({"3.weight": [12, 5]}),
        lambda t, m: m["shapes"].update({"3.weight": "ab"}),
        lambda t, m: m["shapes"].update({"3.weight": None}),
        lambda t, m: m["shapes"].update({"3.weight": [10**30]}),
        lambda t, m: m["shapes"].update({"3.weight": [2**62, 4]}),
        lambda t, m: m["shapes"].update({"3.weight": [-5, -12]}),
        lambda t, m: m["shapes"].update({"4.bias": [3]}) or t.update({"4.bias.bits": torch.ones(1).byte()}),
        lambda t, m: m.update(shapes=[1]),
        lambda t, m: m.pop("shapes"),
        lambda t, m: m.pop("format"),
        lambda t, m: m.update(format="lth-ticket-9"),
    ],
)
def test_a_ticket_that_contradicts_itself_is_refused(change, tmp_path):
    lth.save(ticket(), tmp_path / "t")
    tensors, metadata = read_tensors(tmp_path / "t")
    change(tensors, metadata)
    write_tensors(tmp_path / "t", tensors, metadata)
    assert refused(tmp_path / "t")


def test_files_that_are_no_tickets(tmp_path):
    path = tmp_path / "t"
    safetensors.torch.save_file(network().state_dict(), path)
    assert refused(path)
    safetensors.torch.save_file(network().state_dict(), path, metadata={"lth_sparse": "[1, 2]"})
    assert refused(path)
    torch.save(network().state_dict(), path)
    assert refused(path)
    for missing in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(FileNotFoundError, match=f"^no such file: {missing}$"):
            lth.load_(network(), missing)


def test_saving_replaces_in_one_piece_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "t"
    lth.save(ticket(), path)
    before = path.read_bytes()

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left on device"):
        lth.save(ticket(seed=1), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError):
        lth.save(ticket(), tmp_path / "no" / "such" / "folder")
    with pytest.raises(ValueError, match="no masked layers"):
        lth.save(network(), path)
    assert path.read_bytes() == before


def test_an_interrupt_is_not_taken_for_damage(tmp_path, monkeypatch):
    """As when a signal comes while torch asks a storage for its first byte, and makes a TypeError of what it raised."""
    lth.save(ticket(), tmp_path / "t")
    getitem = torch.UntypedStorage.__getitem__

    def interrupted(storage, index):
        if isinstance(index, int):
            raise KeyboardInterrupt
        return getitem(storage, index)

    monkeypatch.setattr(torch.UntypedStorage, "__getitem__", interrupted)
    with contextlib.suppress(KeyboardInterrupt):
        assert len(read_tensors(tmp_path / "t")[0]) > 5


@pytest.mark.parametrize("metadata", [{}, {"__metadata__": None}, {"__metadata__": {}}])
def test_files_without_metadata_are_no_tickets(metadata, tmp_path):
    header = json.dumps(metadata).encode()
    (tmp_path / "t").write_bytes(len(header).to_bytes(8, "little") + header)
    assert read_tensors(tmp_path / "t") == ({}, {})
    with pytest.raises(ValueError, match="t is not a ticket: its format is None"):
        lth.load_(network(), tmp_path / "t")
