"""The benchmark suite: what it records when all goes well, and when something is wrong, missing or stopped."""

import contextlib
import json
import math
import time

import pytest
import torch
from lth_sparse.benchmarks import clocks, compare, layers, networks, providers, records, shapes, suite
from lth_sparse.benchmarks.records import Record
from torch import nn

from lth_sparse import cli

CPU = torch.device("cpu")
TINY = shapes.Level(minutes=1, seconds=0.0, rounds=(7,), linear=((24, 16, 4),))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Choices of strategies measured here are nobody else's."""
    monkeypatch.setenv("LTH_CACHE", str(tmp_path / "cache"))


def only(monkeypatch, **makers):
    """Leave dense and these providers."""
    names = {name.replace("_", " "): maker for name, maker in makers.items()}
    monkeypatch.setattr(providers, "sparse", lambda kind: names)
    monkeypatch.setattr(providers, "SPARSE", names)


def by_status(found: list[Record]) -> dict[str, set[str]]:
    statuses: dict[str, set[str]] = {}
    for record in found:
        statuses.setdefault(record.status, set()).add(record.provider)
    return statuses


def test_records_come_back_as_they_were(tmp_path):
    given = [Record("layers", "linear step", "a", value=0.5, low=0.4, high=math.inf, n=7), Record(status="no GPU")]
    records.write(tmp_path / "records.jsonl", given)
    assert records.read(tmp_path / "records.jsonl") == [given[0]._replace(high=None), given[1]]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
    (tmp_path / "records.jsonl").write_text('{"colour": "blue"}\n')
    with pytest.raises(ValueError, match="records.jsonl is damaged"):
        records.read(tmp_path / "records.jsonl")


def test_every_record_says_where_it_is_from(monkeypatch, tmp_path):
    found = records.origin(CPU)
    assert f"{torch.get_num_threads()} threads" in found["device"] and torch.__version__ in found["versions"]
    monkeypatch.setattr(records, "ROOT", tmp_path)  # no checkout
    assert records.origin(CPU)["commit"] == ""


def test_the_levels_name_layers_densities_and_networks():
    for level in shapes.LEVELS.values():
        assert level.densities()[-1] < 0.02 and all(name in shapes.NETWORKS for name in level.networks)
        assert set(level.parts) == set(providers.PARTS)
    assert str(shapes.LEVELS["smoke"].linears()[0]) == "784 to 300, batch 60"
    assert len(shapes.LEVELS["core"].convolved("vgg-19")) == 1 < len(shapes.LEVELS["full"].convolved("vgg-19"))
    full = {shape.arguments[:2] + shape.input[:1] for shape in shapes.LEVELS["full"].linears()}
    assert {(16384, 16384, 4096), (784, 300, 1)} <= full


def test_convolutions_are_found_by_running_the_network():
    first, second = shapes.convolutions("conv-2")
    assert (first.input, second.input) == ((60, 3, 32, 32), (60, 64, 32, 32))
    assert str(second) == "64 to 64, 3x3 on 32x32, batch 60" and isinstance(second.layer(), nn.Conv2d)
    assert shapes.work(second) == 60 * 32 * 32 * 64 * 64 * 9
    strided = [str(shape) for shape in shapes.convolutions("resnet-18") if shape.arguments[3] == (2, 2)]
    assert strided[0] == "16 to 32, 3x3 by 2 on 32x32, batch 128"
    assert len(shapes.convolutions("resnet50")) > 15


@pytest.mark.parametrize(("n", "left_out"), [(6, 0), (8, 0), (9, 1), (41, 13)])
def test_the_interval_covers_the_median_with_95_percent(n, left_out):
    found = compare.summary([float(i) for i in range(n)])
    assert (found["low"], found["high"], found["n"]) == (left_out, n - 1 - left_out, n)
    outside = sum(math.comb(n, i) for i in range(left_out + 1)) / 2**n  # binomial: so many on one side of the median
    assert 2 * outside <= 0.05 < 2 * (outside + math.comb(n, left_out + 1) / 2**n)


def test_five_timings_have_no_interval():
    assert compare.summary([1.0, 2.0, 3.0, 4.0, 5.0]) == {"value": 3.0, "low": None, "high": None, "n": 5}


def test_closures_take_turns_and_slow_ones_sit_out():
    calls = []
    waits = {"a": 0.003, "b": 0.003, "slow": 0.03}
    closures = {name: lambda name=name: (calls.append(name), time.sleep(waits[name])) for name in waits}
    ((clock, times),) = clocks.timed(closures, CPU, 0.0)
    assert clock == clocks.CALL and [len(times[name]) for name in waits] == [7, 7, 3]
    assert calls == [*"aabb", "slow", "slow", *(["a", "a", "b", "b", "slow", "slow"] * 3), *("aabb" * 4)]
    assert all(times[name][0] >= waits[name] for name in waits)


def test_short_closures_are_timed_several_at_once():
    calls = []
    ((_, times),) = clocks.timed({"a": lambda: calls.append(1)}, CPU, 0.01)
    assert len(times["a"]) == clocks.MOST and len(calls) == 2 + clocks.MOST * 21


def test_kernels_are_timed_behind_a_full_queue(monkeypatch):
    log = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            log.append("event")

        def elapsed_time(self, end):
            return 5.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append(cycles), raising=False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: log.append("wait"))
    assert clocks._kernel_seconds(lambda: log.append("step"), wait=0.001) == 0.005
    assert log == ["step", 2_000_000, "event", "step", "event", "wait"]
    log.clear()
    flush = torch.zeros(4)
    clocks._kernel_seconds(lambda: log.append(flush.sum().item()), wait=0, flush=flush)
    assert log == [0, "event", 4.0, "event", "wait"]


def test_ratios_are_of_the_same_turn_and_against_the_faster_dense():
    times = {
        "dense, fused Adam": [2.0] * 7,
        "dense, compiled": [1.0] * 7,
        providers.PRUNE: [8.0, 8.0, 8.0],
        "x": [0.5] * 7,
    }
    found = list(compare.compared(Record(name="linear step"), times))
    ratio = {(record.provider, record.metric): record for record in found}
    assert ratio["x", compare.OVER_TUNED].value == 2.0 and ratio["x", compare.OVER_PRUNE].value == 16.0
    assert ratio["x", compare.OVER_PRUNE].n == 3 and ratio["x", compare.OVER_PRUNE].low is None
    assert ratio["dense, fused Adam", compare.OVER_TUNED].value == 0.5
    assert ("dense, compiled", compare.OVER_TUNED) not in ratio
    assert all((record.provider, compare.TIME) in ratio for record in found)


def once(closures, device, allowance):
    """In place of `timed`: the closures have been called, which is enough where kernels are interpreted."""
    yield clocks.CALL, dict.fromkeys(closures, [1.0] * 7)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # Triton's interpreter, on NaN
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_every_provider_that_can_run_here_is_right_and_timed(kind, monkeypatch):
    monkeypatch.setattr(compare, "timed", once)
    shape = shapes.Shape("conv2d", (4, 8, (3, 3), (2, 2), (1, 1), (1, 1), 1, False), (1, 4, 5, 5))
    shape = shape if kind == "conv2d" else shapes.Shape("linear", (32, 32), (4, 32))
    monkeypatch.setattr(shapes.Level, "linears", lambda level: [shape])
    parts = providers.PARTS if kind == "linear" else ("input gradient", "step")
    found = list(layers.section(TINY._replace(parts=parts), CPU))
    statuses = by_status(found)
    assert statuses.keys() <= {"ok", "no GPU", "not runnable"}, [r for r in found if r.status in ("wrong", "failed")]
    wanted = {"dense, Adam", "dense, fused Adam", "dense, masked by hand", providers.PRUNE, "ours: masked"}
    wanted |= {"torch CSR", "torch BSR", "ours: cpu"} if kind == "linear" else set()
    assert statuses["ok"] == wanted | {providers.CHOSEN} | {f"ours: {s}" for s in strategies(kind)}
    assert {record.name for record in found} == {f"{kind} {part}" for part in parts}
    assert "dense, compiled" in statuses["no GPU"]


def strategies(kind):
    return [name for name in layers.providers.dispatch.runnable(CPU, torch.float32, kind) if name != "masked"]


def test_a_wrong_provider_has_no_ratio(monkeypatch):
    class Wrong(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 1.001

    def wrong(model, masks, x):
        model.__class__ = Wrong
        return providers.by_hand(model, masks, x)

    only(monkeypatch, wrong=wrong, right=providers.by_hand)
    found = list(layers.section(TINY, CPU))
    (fault,) = [record for record in found if record.provider == "wrong"]
    assert fault.status == "wrong" and fault.value is None and "forward off by 1.0e-03" in fault.note
    assert any(record.provider == "right" and record.metric == compare.OVER_TUNED for record in found)
    assert suite.verdict(found) == 1


def test_a_gradient_off_in_one_place_is_wrong(monkeypatch):
    def wrong(model, masks, x):
        found = providers.by_hand(model, masks, x)
        row, column = masks[""].nonzero()[0]
        model.weight.register_hook(lambda gradient: gradient.index_put((row, column), torch.tensor(0.01)))
        return found

    def lacking(model, masks, x):
        found = providers.by_hand(model, masks, x)
        forward = model.forward
        model.forward = lambda x: forward(x.detach())
        return found

    only(monkeypatch, wrong=wrong, lacking=lacking)
    notes = [record.note for record in layers.section(TINY, CPU) if record.status == "wrong"]
    assert notes[0].startswith("weight gradient off by") and "forward" not in notes[0]
    assert notes[1:] == ["input gradient off by inf"]


def test_failing_providers_are_kept_with_their_reason(monkeypatch):
    def raising(error):
        def make(model, masks, x):
            raise error

        return make

    only(
        monkeypatch,
        memory=raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")),
        cpu_memory=raising(RuntimeError("DefaultCPUAllocator: can't allocate memory")),
        triton=raising(ModuleNotFoundError("No module named 'triton'", name="triton.language")),
        unable=raising(providers.Unable("it does not do that")),
        broken=raising(KeyError("who")),
        good=providers.by_hand,
    )
    found = list(layers.section(TINY, CPU))
    statuses = by_status(found)
    assert statuses["out of memory"] == {"memory", "cpu memory"} and statuses["no Triton"] == {"triton"}
    assert statuses["not runnable"] == {"unable"} and statuses["failed"] == {"broken"}
    assert "good" in statuses["ok"] and suite.verdict(found) == 0
    assert next(record.note for record in found if record.provider == "broken") == "KeyError: 'who'"


def test_a_network_that_cannot_be_built_leaves_the_others(monkeypatch):
    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(shapes, "convolutions", broken)
    only(monkeypatch, good=providers.by_hand)
    found = list(layers.section(TINY._replace(convolutions=("resnet50",)), CPU))
    assert (found[0].name, found[0].status) == ("convolutions of resnet50", "failed")
    assert "good" in by_status(found)["ok"]


def test_what_fails_while_it_is_timed_leaves_the_others(monkeypatch):
    class Tires(torch.optim.SGD):
        def step(self):
            raise RuntimeError("tired")

    def tires(model, masks, x):
        return providers.by_hand(model, masks, x)._replace(optimizer=Tires(model.parameters()))

    only(monkeypatch, tires=tires, good=providers.by_hand)
    found = list(layers.section(TINY, CPU))
    failed = {record.name for record in found if record.status == "failed"}
    assert failed == {"linear optimizer", "linear step"}
    assert {record.name for record in found if record.provider == "good"} == {f"linear {p}" for p in providers.PARTS}


def test_networks_have_rates_and_memory():
    level = TINY._replace(linear=(), networks=("lenet-300-100",), rounds=(17,))
    found = list(networks.section(level, CPU))
    assert by_status(found).keys() == {"ok", "no GPU"}
    values = {(record.provider, record.metric): record.value for record in found}
    weights = 784 * 300 + 300 * 100 + 100 * 10
    assert values["dense, fused Adam", networks.RESIDENT] == pytest.approx(16 * (weights + 410), rel=1e-3)
    assert values["ours: masked", networks.RESIDENT] > values["dense, fused Adam", networks.RESIDENT]
    assert values[providers.CHOSEN, networks.RATE] > 10
    rates = [record for record in found if record.metric == networks.RATE]
    assert rates and all(record.low <= record.value <= record.high for record in rates if record.low)


def test_a_network_with_wrong_logits_has_no_ratio(monkeypatch):
    def wrong(model, masks, x):
        model.output.bias.data += 1
        return providers.by_hand(model, masks, x)

    only(monkeypatch, wrong=wrong)
    level = TINY._replace(networks=("lenet-300-100",))
    (fault,) = [record for record in networks.section(level, CPU) if record.provider == "wrong"]
    assert fault.status == "wrong" and fault.value is None


def numbers(level, device):
    for density in (0.5, 0.2, 0.1):
        yield Record(name="linear step", provider="a", density=density, metric=compare.TIME, value=density, n=7)


def stopped(level, device):
    yield from list(numbers(level, device))[:2]
    raise KeyboardInterrupt


def broken(level, device):
    yield from list(numbers(level, device))[:1]
    raise OSError("no such thing")


def test_ctrl_c_keeps_what_was_measured(tmp_path):
    seen = []
    found = suite.run(TINY, CPU, tmp_path, {"first": numbers, "second": stopped, "third": numbers}, seen.append)
    assert records.read(tmp_path / "records.jsonl") == found and seen == found[:-1]
    assert [record.section for record in found] == ["first"] * 3 + ["second"] * 3
    assert found[-1].status == "interrupted" and suite.verdict(found) == 130


def test_a_broken_section_leaves_the_others(tmp_path):
    found = suite.run(TINY, CPU, tmp_path / "new", {"first": broken, "second": numbers})
    assert [record.status for record in found] == ["ok", "failed", "ok", "ok", "ok"]
    assert found[1].section == "first" and "no such thing" in found[1].note and suite.verdict(found) == 0


def test_out_of_time_the_rest_is_named(tmp_path):
    found = suite.run(TINY._replace(minutes=0), CPU, tmp_path, {"first": numbers, "second": numbers})
    assert [record.status for record in found] == ["ok", "out of time"] * 2
    assert found[1].note == "stopped after linear step, density 50.0%"


def test_records_are_kept_while_measuring(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "SAVE_SECONDS", 0)
    kept = []

    def watch(record):
        with contextlib.suppress(FileNotFoundError):
            kept.append(len(records.read(tmp_path / "records.jsonl")))

    suite.run(TINY, CPU, tmp_path, {"first": numbers}, watch)
    assert kept == [1, 2]


def test_the_precision_is_left_as_it_was():
    torch.set_float32_matmul_precision("medium")
    try:
        with contextlib.suppress(StopIteration), compare.computing("fp32"):
            assert torch.get_float32_matmul_precision() == "highest"
            raise StopIteration
        with compare.computing("tf32"):
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(shapes.LEVELS, "smoke", TINY)
    monkeypatch.setattr(suite, "SECTIONS", {"layers": layers.section})
    only(monkeypatch, **{providers.CHOSEN: providers.chosen})
    monkeypatch.chdir(tmp_path)
    assert cli.main(["bench", "--device=cpu", "--json"]) == 0
    out, err = capsys.readouterr()
    folder = tmp_path / "runs" / "bench-smoke-cpu"
    assert [Record(**row) for row in json.loads(out)] == records.read(folder / "records.jsonl")
    assert "linear 24 to 16, batch 4" in err and "ours: chosen" in err and "no GPU" in err
    assert {path.suffix for path in folder.iterdir()} == {".jsonl", ".png", ".svg", ".json"}


def test_the_command_says_why_it_stops(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(suite, "SECTIONS", {"layers": stopped})
    assert cli.main(["bench", "--device=cpu", f"--out={tmp_path}"]) == 130
    assert "interrupted" in capsys.readouterr().err and len(records.read(tmp_path / "records.jsonl")) == 3
    if not torch.cuda.is_available():
        assert cli.main(["bench", "--device=cuda", f"--out={tmp_path / 'none'}"]) == 2
        assert not (tmp_path / "none").exists() and "CUDA" in capsys.readouterr().err
    assert cli.main(["bench", "--level=huge"]) == 2


def test_the_compiled_baseline_is_checked_like_the_others(monkeypatch):
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compile(model, backend="eager"))
    monkeypatch.setattr(providers, "absent", lambda kind, device: {})
    monkeypatch.setattr(providers, "DENSE", {"dense, compiled": providers.compiled})
    only(monkeypatch, by_hand=providers.by_hand)
    found = list(layers.section(TINY, CPU))
    assert by_status(found) == {"ok": {"dense, compiled", "by hand"}, "not runnable": {"dense, compiled"}}
    lacking = {record.name for record in found if record.status == "not runnable"}
    assert lacking == {"linear input gradient", "linear weight gradient"}
    assert {r.name for r in found if r.provider == "dense, compiled" and r.metric == compare.TIME} == {
        "linear forward",
        "linear optimizer",
        "linear step",
    }


def test_half_precision_keeps_float32_weights(monkeypatch):
    monkeypatch.setattr(layers, "precisions", lambda wanted, device: ("bf16",))
    makers = {providers.CHOSEN: providers.chosen, "masked": providers.masked, "two": providers.two_of_four}
    only(monkeypatch, prune=providers.pruned, **makers)
    found = list(layers.section(TINY, CPU))
    assert {record.precision for record in found if record.value} == {"bf16"}
    assert by_status(found)["ok"] >= {"masked", "prune", "dense, Adam", providers.CHOSEN} and "wrong" not in by_status(
        found
    )
    assert "half of the weights" in next(record.note for record in found if record.provider == "two")


@pytest.mark.gpu
def test_on_cuda_all_are_right_by_three_clocks():
    level = TINY._replace(precisions=("tf32", "bf16", "fp32"), linear=((64, 64, 32),), rounds=(3, 10))
    found = list(layers.section(level, torch.device("cuda")))
    assert not [record for record in found if record.status in ("wrong", "failed")]
    assert {record.clock for record in found if record.value} == {clocks.CALL, clocks.HOT, clocks.COLD}
