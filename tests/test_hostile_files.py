"""Files that somebody else made: each is read, or refused in one sentence; nothing is unpickled or written elsewhere.

LTH_HOSTILE_CASES=10000 tries so many in each test; without it there are as many as take a few seconds.
"""

import contextlib
import copy
import io
import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_folders import tiny
from torch import nn

import lth_sparse as lth
from lth_sparse import checkpoint, cli, data, experiment, recipes, report, runs
from lth_sparse.training import group

CASES = int(os.environ.get("LTH_HOSTILE_CASES", "0"))
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


def cases(few: int):
    """Settings of a property: `few` cases, or as many as are asked for."""
    return settings(max_examples=CASES or few, deadline=None, suppress_health_check=QUIET, database=None)


NAMES = st.sampled_from(
    ["format", "shapes", "settings", "arms", "rounds", "round", "kept", "iteration", "..", "a/b", ""]
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**400), 10**400),
    st.sampled_from(
        [0, -1, 1, 2**63, 10**400, 1e308, float("nan"), float("inf"), "ticket", "../../x", "[/x]", "\ud800"]
    ),
    st.floats(),
    st.text(max_size=8),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def mutated(draw, whole: bytes) -> bytes:
    """`whole` with bits flipped, bytes changed, cut out or put in, or cut off."""
    content = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "byte", "cut", "insert", "truncate"]))
        if how == "flip" and content:
            content[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "byte" and content:
            content[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del content[at : at + draw(st.integers(1, 16))]
        elif how == "insert":
            content[at:at] = draw(st.binary(max_size=16))
        else:
            del content[at:]
    return bytes(content)


@st.composite
def changed(draw, whole):
    """JSON `whole` with one entry, somewhere inside, replaced or left out."""
    content = copy.deepcopy(whole)
    place, key = content, draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], (dict, list)) and place[key] and draw(st.booleans()):
        place = place[key]
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    if draw(st.booleans()):
        place[key] = draw(VALUES)
    else:
        del place[key]
    return content


def refused(call, *arguments) -> bool:
    """Whether `call` refuses, which it does in one sentence; any other exception is the failure."""
    try:
        call(*arguments)
    except (ValueError, FileNotFoundError) as error:
        assert str(error) and len(str(error).split(". ")) < 4
        return True
    return False


def network():
    return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run in the middle of its second round, and a ticket."""
    folder, advance = tmp_path_factory.mktemp("made"), group.Group._advance

    def advancing(self):
        if self.iteration >= 8 and "round_01" in self.tickets[0].label:
            raise RuntimeError("stop")
        advance(self)

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError):
        patch.setattr(group, "SAVE_SECONDS", -1.0)
        patch.setattr(group, "STEPS", 1)
        patch.setattr(group.Group, "_advance", advancing)
        experiment.run(tiny(arms=("ticket",), rounds=1), out=folder / "run")
    torch.manual_seed(0)
    lth.save(lth.prune_(lth.sparsify_(network()), 0.5), folder / "ticket")
    assert (folder / "run/ticket/trial_0/round_01/training.safetensors").exists()
    return folder


@cases(150)
@given(draw=st.data())
def test_bytes_of_a_ticket(made, tmp_path, draw):
    path = tmp_path / "t"
    path.write_bytes(draw.draw(mutated((made / "ticket").read_bytes())))
    model, before = network(), network()
    before.load_state_dict(model.state_dict())
    if path.read_bytes() != (made / "ticket").read_bytes():
        assert refused(lth.load_, model, path)
        assert [type(layer) for layer in model] == [nn.Linear] * 2
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def with_header(content: bytes, header: dict) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + int.from_bytes(content[:8], "little") :]


@cases(150)
@given(draw=st.data())
def test_headers_and_metadata_of_a_ticket(made, tmp_path, draw):
    """As somebody writes them who leaves the checksum out."""
    content, path = (made / "ticket").read_bytes(), tmp_path / "t"
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = json.loads(header["__metadata__"]["lth_sparse"])
    del metadata["checksum"]
    if draw.draw(st.booleans()):
        metadata = draw.draw(changed(metadata) | VALUES)
        header["__metadata__"]["lth_sparse"] = json.dumps(metadata)
    else:
        header["__metadata__"]["lth_sparse"] = json.dumps(metadata)
        header = draw.draw(changed(header))
    path.write_bytes(with_header(content, header))
    refused(lth.load_, network(), path)


@cases(100)
@given(
    content=st.dictionaries(
        st.sampled_from(["0.weight.bits", "0.weight.values", "0.bias", "1.weight", "1.bias", "0.weight_frozen", "x"]),
        st.tuples(
            st.lists(st.integers(0, 6), max_size=3),
            st.sampled_from([torch.float32, torch.uint8, torch.bool, torch.int64, torch.complex64, torch.float8_e5m2]),
        ),
    ),
    shapes=st.dictionaries(
        st.sampled_from(["0.weight", "1.weight", "0.bias", ""]), st.just([5, 6]) | VALUES, max_size=2
    ),
)
def test_tensors_of_a_ticket(tmp_path, content, shapes):
    tensors = {name: torch.zeros(shape).to(dtype) for name, (shape, dtype) in content.items()}
    checkpoint.write_tensors(tmp_path / "t", tensors, {"format": checkpoint.FORMAT, "shapes": shapes})
    refused(lth.load_, network(), tmp_path / "t")


FILES = (
    "recipe.json",
    "environment.json",
    *(f"ticket/trial_0/round_00/{name}" for name in ("result.json", "metrics.jsonl")),
)


def lines_of(run, command, *options):
    """Exit code and stderr of `lth`; any exception is the failure."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()):
        said = io.StringIO()
        patch.setattr(cli.console, "_file", said)  # its property would pin the stream of now
        patch.setattr(cli.plots, "draw", lambda *arguments: [])
        return cli.main([command, str(run), *options]), said.getvalue()


@pytest.mark.parametrize("sealed", [True, False])
@cases(60)
@given(draw=st.data())
def test_files_of_a_run_reported(made, tmp_path, sealed, draw):
    """Changed as by a disk, or as by somebody who leaves the checksum out."""
    path = made / "run" / draw.draw(st.sampled_from(FILES))
    before = path.read_bytes()
    if sealed:
        after = draw.draw(mutated(before))
    elif path.suffix == ".jsonl":
        after = "".join(json.dumps(draw.draw(changed(json.loads(row)))) + "\n" for row in before.splitlines()).encode()
    else:
        content = json.loads(before)
        del content["checksum"]
        after = json.dumps(draw.draw(changed(content))).encode()
    outside = sorted(made.iterdir())
    try:
        path.write_bytes(after)
        code, said = lines_of(made / "run", "report", "--json", "--export", str(tmp_path / "export"))
    finally:
        path.write_bytes(before)
    assert code in (0, 2) and sorted(made.iterdir()) == outside
    assert code == 0 or said.splitlines()[-1].startswith("lth: "), said


STATE = "ticket/trial_0/round_01/training.safetensors"


@contextlib.contextmanager
def state_in_place(made, tensors, progress):
    """The training that has this state beside it; afterwards the state is as it was."""
    path = made / "run" / STATE
    before = path.read_bytes()
    recipe = tiny(arms=("ticket",), rounds=1).resolve(1257)
    loaded = data.load("digits")
    (chain,) = experiment.chains(recipe, loaded)
    model = lth.load_(chain.model, path.with_name("ticket.safetensors"))
    ticket = group.Ticket(model, "ticket/trial_0/round_01", 0, start=3, folder=path.parent)
    try:
        checkpoint.write_tensors(path, tensors, progress)
        yield group.Group(group.Stack, [ticket], loaded, recipe, {})
    finally:
        path.write_bytes(before)


def trained(learner):
    return learner.run(lambda label, row: None, group.threading.Event(), group.Turns(1))


@cases(25)
@given(draw=st.data())
def test_a_state_of_training(made, draw):
    """Well-formed, and of something else: the training is not taken up from it."""
    tensors, progress = checkpoint.read_tensors(made / "run" / STATE)
    if draw.draw(st.booleans()):
        progress = draw.draw(changed(progress))
    else:
        name = draw.draw(st.sampled_from(sorted(tensors)))
        tensors[name] = torch.zeros(draw.draw(st.lists(st.integers(0, 5), max_size=3)))
    with state_in_place(made, tensors, progress) as learner:
        refused(trained, learner)


@pytest.mark.parametrize("entry", ["seconds", "iteration", "row"])
@pytest.mark.parametrize("value", [10**400, float("nan"), "8"])
def test_numbers_in_a_state_of_training(made, entry, value):
    tensors, progress = checkpoint.read_tensors(made / "run" / STATE)
    place, key = (progress["histories"][0][0], "iteration") if entry == "row" else (progress, entry)
    place[key] = value
    with state_in_place(made, tensors, progress) as learner:
        assert refused(trained, learner) or entry == "row"


TOML = b"""source = "paper"
claims = ["LN1"]
[settings]
dataset = "digits"
rounds = 2
arms = ["ticket", "random"]
milestones = ["2ep"]
[variant.a]
lr = 0.1
[variant."b c"]
optimizer = "sgd"
[scale.smoke]
iterations = 4
[scale.smoke.variant.a]
seed = 3
"""


@cases(200)
@given(text=mutated(TOML) | st.binary(max_size=40), scale=st.sampled_from([None, "smoke"]))
def test_recipes(tmp_path, text, scale):
    (tmp_path / "r.toml").write_bytes(text)
    refused(recipes.read, tmp_path / "r.toml", scale)


KEYS = st.sampled_from([*recipes.Recipe.__dataclass_fields__, "x"])


@cases(150)
@given(
    content=st.dictionaries(
        KEYS, LEAVES.filter(lambda leaf: leaf is not None) | st.lists(LEAVES, max_size=2), max_size=3
    )
)
def test_settings(content):
    def resolved():
        found = recipes.parse(content)
        assert found.resolve(1257).identity()

    refused(resolved)


@pytest.mark.parametrize("name", ["..", "../../x", "/tmp/x", "a/b", "."])
def test_nothing_is_written_outside_the_run_folder(tmp_path, made, name):
    inner = tmp_path / "deep" / "er"
    inner.mkdir(parents=True)
    (inner / "r.toml").write_text(f'[settings]\ndataset = "digits"\n[variant."{name}"]\n')
    with pytest.raises(ValueError, match="cannot be the name"):
        recipes.read(inner / "r.toml")
    runs.write_json(inner / "recipe.json", {"name": "x", "variants": [name]})
    with pytest.raises(ValueError, match="recipe.json is damaged"):
        report.variants(inner)


def test_links_are_not_written_through(tmp_path):
    (tmp_path / "mine").write_text("mine")
    run = tmp_path / "run"
    run.mkdir()
    for name in ("lock", "recipe.json", "recipe.json.part", "environment.json.part"):
        (run / name).symlink_to(tmp_path / "mine")
        with contextlib.suppress(ValueError), runs.opened(tiny().resolve(1257), "demo", run):
            pass
        assert (tmp_path / "mine").read_text() == "mine"
        for path in run.iterdir():
            path.unlink()


@pytest.mark.parametrize("text", [b"[" * 10**5, b'{"a":' * 10**5, b"1" * 10**5, b'"\\ud800"', b"a=" + b"[" * 10**5])
def test_what_is_nested_deeply_or_counts_far(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text)
    assert refused(runs.read_json, tmp_path / "a.json")
    assert refused(runs.read_rows, tmp_path / "a.json")
    assert refused(recipes.read, tmp_path / "a.json")


@pytest.mark.parametrize("name", ["pipe", "device", "folder"])
def test_what_is_no_file_is_not_waited_for(tmp_path, name):
    path = tmp_path / "a.json"
    {"pipe": os.mkfifo, "device": lambda p: p.symlink_to("/dev/zero"), "folder": os.mkdir}[name](path)
    assert refused(runs.read_json, path) and refused(runs.read_rows, path) and refused(checkpoint.read_tensors, path)


class Bomb:
    """Unpickled, it says so."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10"])
@cases(20)
@given(text=st.binary(max_size=64) | st.just(pickle.dumps(Bomb())) | st.just(b"\0\0\x08\x03\xff\xff\xff\xff" * 4))
def test_data_files_are_not_read_before_they_are_known(tmp_path, name, text):
    folder = (
        tmp_path / {"mnist": "MNIST/raw", "fashion-mnist": "FashionMNIST/raw", "cifar10": "cifar-10-batches-py"}[name]
    )
    folder.mkdir(parents=True, exist_ok=True)
    cifar = ["batches.meta", "test_batch", *(f"data_batch_{i}" for i in range(1, 6))]
    for file in cifar if name == "cifar10" else data._IDX_MD5[name]:
        (folder / file).write_bytes(text)
    assert refused(data.load, name, tmp_path, "unit", None, 0, "cpu", False)


def test_a_pickle_is_no_ticket(tmp_path):
    for save in (torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))):
        save({"0.weight": Bomb()}, tmp_path / "t")
        assert refused(lth.load_, network(), tmp_path / "t")
