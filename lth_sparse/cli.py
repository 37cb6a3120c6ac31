"""The `lth` command. Tables and progress go to stderr, one JSON document to stdout with --json.

Exit codes: 0 done; 1 failed while running; 2 arguments or input files; 130 interrupted, with the state saved.
"""

import contextlib
import json
import signal
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import (
    determinism,
    dispatch,
    experiment,
    ops,
    plots,
    recipe,
    recipes,
    report,
    runs,
    shards,
    tables,
    training,
)
from .arguments import assignment, parse
from .progress import Progress

console = Console(stderr=True, highlight=False, markup=False)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process unless given); returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    training.keep_freed_memory()
    shards.take_device()
    try:
        options = parse(arguments)
        return COMMANDS[options.command](options) or 0
    except KeyboardInterrupt:
        return _fail("interrupted; the state is saved, and the same command goes on from here", 130)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error}; finished rounds are kept, and the same command goes on from there", 1)


def _fail(sentence, code):
    console.print(f"lth: {' '.join(sentence.split())}", soft_wrap=True)
    return code


def _find_ticket(options):
    settings = {f.name: getattr(options, f.name) for f in fields(recipe.Recipe)}
    places = [name for name in ("model", "dataset") if settings[name] is None]  # the others are given as options
    settings |= dict(zip(places, options.words, strict=False))
    missing = [name for name in places if settings[name] is None]
    if missing or len(options.words) > len(places) + 1:
        what = f"has no {missing[0]}" if missing else f"takes no {options.words[-1]!r}"
        raise ValueError(f"find-ticket {what}: write it as lth find-ticket lenet-300-100 digits")
    data_dir = options.words[len(places)] if len(options.words) > len(places) else "datasets"
    asked = recipe.parse(settings)
    return _carry_out(recipes.Experiment(asked.name, "", "", (), {"": asked}), data_dir, options)


def _run(options):
    if options.list:
        _list_recipes(options)
        return
    if not 1 <= len(options.words) <= 2:
        raise ValueError("run takes the name of a recipe, and the folder of the data: see lth run --list")
    name, data_dir = [*options.words, "datasets"][:2]
    path = recipes.find(name)
    changes = dict(assignment(text) for text in options.set)
    return _carry_out(recipes.read(path, changes.pop("scale", None), **changes), data_dir, options)


def _carry_out(asked, data_dir, options):
    shard = shards.parse(options.shard) if options.shard else shards.of_torchrun()
    with contextlib.ExitStack() as stack:

        def variant(name, settings):
            stack.close()
            if name and not options.quiet:
                console.print(f"{asked.name}: {name}", soft_wrap=True)
            progress = stack.enter_context(Progress(settings, console, options.quiet, live=shard is None))
            return {"on_metrics": progress.metrics, "on_round": progress.round}

        reuse = getattr(options, "reuse", [])
        folder = experiment.run_all(asked, data_dir, options.out, variant, reuse, shard)
    if shard and not all(shards.is_done(folder / name) for name in asked.variants):
        console.print(f"{shard} is done, others of {folder} are not yet", soft_wrap=True)
        return
    with runs.alone(folder):
        _show(folder, options)


def _merge(options):
    folder = shards.merge(options.runs, options.out)
    _show(folder, options)


def _show(folder, options):
    """Print what a run found, and draw its figures."""
    found = _read(folder)
    figures = _draw(folder, found, folder / "figures")
    if not options.quiet:
        _print_tables(folder, found)
        _print_paths(folder, figures)
    if options.json:
        print(json.dumps(_document(found), indent=1))


def _ls(options):
    paths = sorted(options.folder.glob("*/recipe.json")) if options.folder.is_dir() else ()
    found = {str(run): report.summarize(run) for path in paths for run in report.variants(path.parent).values()}
    if not found:
        raise ValueError(f"there are no runs in {options.folder}")
    if options.json:
        about = ("name", "settings", "status", "winning_ticket")
        print(json.dumps({run: {key: summary[key] for key in about} for run, summary in found.items()}, indent=1))
        return
    table = Table("run", "done", "winning ticket", "test accuracy", box=None)
    table.columns[0].overflow = "fold"  # which variant it is stands at the end
    for run, summary in found.items():
        winner = summary["winning_ticket"]
        ticket = f"{winner['density']:.1%} of the weights" if winner else "-"
        accuracy = f"{winner['early_stop']['test_accuracy']:.2%}" if winner else "-"
        table.add_row(run, "{done}/{planned}".format(**summary["status"]), ticket, accuracy)
    console.print(table)


def _report(options):
    folder = _run_folder(options.run)
    found = _read(folder)
    written = _draw(folder, found, options.save, each=False) if options.save else []
    for name, run in report.variants(folder).items():
        written += report.export(run, options.export / name) if options.export else []
        if options.save:
            written += [options.save / name / "summary.json"]
            runs.write_json(written[-1], found[name][0])
    for path in written:
        console.print(str(path), soft_wrap=True)
    _print_tables(folder, found)
    if options.json:
        print(json.dumps(_document(found), indent=1))


def _read(folder):
    """Summary and curves of a run, or of its variants by name."""
    return {name: (report.summarize(run), report.curves(run)) for name, run in report.variants(folder).items()}


def _document(found):
    """What --json prints: the summary of a run, or those of its variants by name."""
    summaries = {name: summary for name, (summary, _) in found.items()}
    return summaries.get("", summaries)


def _draw(folder, found, to, each=True):
    """Write the figures of a run: of all variants side by side, and of each if `each` or if there is one alone."""
    several = len(found) > 1
    compared = report.side_by_side(runs.read_recipe(folder)["name"], _document(found)) if several else None
    paths = plots.draw(compared, {}, to) if several else []
    drawn = found if each or not several else {}
    return paths + [path for name, given in drawn.items() for path in plots.draw(*given, to / name)]


def _print_tables(folder, found):
    summaries = {name: summary | {"curves": curves} for name, (summary, curves) in found.items()}
    for part in tables.of(summaries, runs.read_recipe(folder)["claims"]):
        console.print(part, soft_wrap=isinstance(part, str))


def _plot(options):
    folder = _run_folder(options.run)
    figures = _draw(folder, _read(folder), folder / "figures")
    _print_paths(folder, figures)
    if options.json:
        print(json.dumps([str(path) for path in figures]))


def _bench(options):
    from .benchmarks import records, suite, tables

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    out = options.out or Path("runs") / f"bench-{options.level}-{device}"
    with console.status("measuring") as status:
        found = suite.bench(options.level, device, out, lambda record: status.update(records.title(record)))
    for table in tables.tables(found):
        console.print(table)
    console.print(f"records and figures: {out}", soft_wrap=True)
    if options.json:
        print(json.dumps([record._asdict() for record in found]))
    return suite.verdict(found)


def _env(options):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.determinism:
        return _determinism(options, device)
    found = runs.environment() | {
        f"{kind} strategies": list(dispatch.runnable(device, torch.float32, kind)) for kind in ops.STRATEGIES
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    table = Table("", "", box=None, show_header=False)
    for key, value in {**found.pop("packages"), **found}.items():
        table.add_row(key, ", ".join(value) if isinstance(value, list) else "none" if value is None else str(value))
    console.print(table)


def _determinism(options, device):
    found = dict(determinism.check(device.type))
    for strategy, outcome in found.items():
        console.print(f"{strategy}: {outcome}")
    if options.json:
        print(json.dumps(found, indent=1))
    return int(set(found.values()) != {determinism.SAME})


def _print_paths(folder, figures):
    console.print(f"run: {folder}", soft_wrap=True)
    drawn = [path for path in figures if path.suffix == ".png"]
    shown = [path for path in drawn if path.parent == folder / "figures"] or drawn
    for path in shown:
        console.print(f"figure: {path}", soft_wrap=True)
    if len(shown) < len(drawn):
        console.print(f"figures of each variant: {folder / 'figures' / 'NAME'}", soft_wrap=True)


def _run_folder(given):
    if Path(given).is_dir():
        return Path(given)
    found = sorted(Path("runs").glob(f"{given}*/recipe.json"))
    if len(found) != 1:
        raise ValueError(f"{given!r} is no run folder, and the start of {len(found)} names in runs/: see lth ls")
    return found[0].parent


def _list_recipes(options):
    known = recipes.known()
    found = {name: recipes.read(path) for name, path in known.items()}
    saved = {name: report.saved(path) for name, path in known.items()}
    if options.json:
        listed = {name: asked._asdict() | {"variants": asked.settings()} for name, asked in found.items()}
        print(json.dumps({name: entry | {"result": saved[name]} for name, entry in listed.items()}, indent=1))
        return
    table = Table("recipe", "source", "claims", "cost", "result", box=None)
    table.columns[0].no_wrap = True
    for name, asked in found.items():
        table.add_row(name, asked.source, " ".join(asked.claims), asked.cost, saved[name])
    console.print(table)
    console.print("CPU: two cores, measured or counted from steps; GPU: one H200, modelled and not yet measured.")


COMMANDS = {
    "find-ticket": _find_ticket,
    "run": _run,
    "merge": _merge,
    "ls": _ls,
    "report": _report,
    "plot": _plot,
    "bench": _bench,
    "env": _env,
}
