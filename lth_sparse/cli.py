"""The `lth` command. Tables and progress go to stderr, one JSON document to stdout with --json.

Exit codes: 0 done; 1 failed while running; 2 arguments or input files; 130 interrupted, with the state saved.
"""

import argparse
import contextlib
import json
import signal
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import (
    __version__,
    determinism,
    dispatch,
    experiment,
    ops,
    plots,
    recipe,
    recipes,
    report,
    runs,
    tables,
    training,
)
from .progress import Progress

console = Console(stderr=True, highlight=False, markup=False)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line `arguments` (those of the process unless given); returns the exit code."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    training.keep_freed_memory()
    try:
        options = _parser().parse_args(arguments)
        return options.command(options) or 0
    except KeyboardInterrupt:
        return _fail("interrupted; the state is saved, and the same command goes on from here", 130)
    except (ValueError, FileNotFoundError, FileExistsError, NotADirectoryError) as error:
        return _fail(str(error), 2)
    except OSError as error:
        return _fail(f"{error}; finished rounds are kept, and the same command goes on from there", 1)


def _fail(sentence, code):
    console.print(f"lth: {' '.join(sentence.split())}", soft_wrap=True)
    return code


def _parser():
    parser = _Parser("lth", description="Find winning tickets, and train them sparse.")
    parser.add_argument("--version", action="version", version=f"lth-sparse {__version__}")
    verbs = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    find = verbs.add_parser("find-ticket", help="the main job: prune iteratively, with controls")
    find.add_argument("words", nargs="*", metavar="MODEL DATASET [DATA_DIR]", help="DATA_DIR is datasets unless given")
    for f in fields(recipe.Recipe):
        choices = f"; one of {', '.join(f.metadata['choices'])}" if f.metadata.get("choices") else ""
        flags = ("--" + f.name.replace("_", "-"), *f.metadata["aliases"])
        find.add_argument(*flags, dest=f.name, metavar="X", help=f.metadata["help"] + choices)
    _add_output(find, _find_ticket)
    run = verbs.add_parser("run", help="run an experiment; again to go on where it stopped")
    run.add_argument("recipe", nargs="?", metavar="RECIPE", help="a name from --list, or the path of a TOML file")
    run.add_argument("data_dir", nargs="?", default="datasets", metavar="DATA_DIR", help="the data (datasets)")
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, or the scale")
    run.add_argument(
        "--reuse", type=Path, metavar="RUN", help="take over the rounds of a run with other arms, rounds or trials"
    )
    run.add_argument("--list", action="store_true", help="list the recipes")
    _add_output(run, _run)
    ls = verbs.add_parser("ls", help="list what ran")
    ls.add_argument("folder", nargs="?", default="runs", type=Path, metavar="DIR", help="where the runs are (runs)")
    ls.set_defaults(command=_ls)
    for verb, command, text in [("report", _report, "print the table of a run"), ("plot", _plot, "draw its figures")]:
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("run", metavar="RUN", help="a run folder, or the start of its name in runs/")
        sub.set_defaults(command=command)
        if verb == "report":
            sub.add_argument("--export", type=Path, metavar="DIR", help="write data.json, data_random.json, ... there")
            sub.add_argument("--save", type=Path, metavar="DIR", help="write summary.json and the figures there")
        sub.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    bench = verbs.add_parser("bench", help="measure what sparse training gains, and where it loses")
    levels = {"choices": ("smoke", "core", "full"), "default": "smoke"}
    bench.add_argument("--level", **levels, help="smoke (3 minutes), core (9 minutes on a GPU) or full (hours)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="records and figures (runs/bench-LEVEL-DEVICE)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU")
    bench.add_argument("--json", action="store_true", help="print the records as one JSON document on stdout")
    bench.set_defaults(command=_bench)
    env = verbs.add_parser("env", help="versions, device, and what can run here")
    env.add_argument("--json", action="store_true", help="print one JSON document on stdout")
    env.add_argument("--determinism", action="store_true", help="train a small network twice and compare the bits")
    env.set_defaults(command=_env)
    return parser


def _add_output(parser, command):
    parser.add_argument("--out", type=Path, metavar="DIR", help="the run folder (runs/NAME--IDENTITY)")
    parser.add_argument("--quiet", action="store_true", help="no progress, no table")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document on stdout")
    parser.set_defaults(command=command)


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
    if options.list or options.recipe is None:
        if not options.list:
            raise ValueError("run needs the name of a recipe: see lth run --list")
        _list_recipes(options)
        return
    path = recipes.find(options.recipe)
    changes = dict(_assignment(text) for text in options.set)
    return _carry_out(recipes.read(path, changes.pop("scale", None), **changes), options.data_dir, options)


def _carry_out(asked, data_dir, options):
    with contextlib.ExitStack() as stack:

        def variant(name, settings):
            stack.close()
            if name and not options.quiet:
                console.print(f"{asked.name}: {name}", soft_wrap=True)
            progress = stack.enter_context(Progress(settings, console, options.quiet))
            return {"on_metrics": progress.metrics, "on_round": progress.round}

        folder = experiment.run_all(asked, data_dir, options.out, variant, getattr(options, "reuse", None))
    found = _read(folder)
    figures = _draw(folder, found, folder / "figures")
    if not options.quiet:
        _print_tables(folder, found)
        _print_paths(folder, figures)
    if options.json:
        print(json.dumps(_document(found), indent=1))


def _ls(options):
    table = Table("run", "done", "winning ticket", "test accuracy", box=None)
    table.columns[0].overflow = "fold"  # which variant it is stands at the end
    for path in sorted(options.folder.glob("*/recipe.json")) if options.folder.is_dir() else ():
        for run in report.variants(path.parent).values():
            summary = report.summarize(run)
            winner = summary["winning_ticket"]
            ticket = f"{winner['density']:.1%} of the weights" if winner else "-"
            accuracy = f"{winner['early_stop']['test_accuracy']:.2%}" if winner else "-"
            table.add_row(str(run), "{done}/{planned}".format(**summary["status"]), ticket, accuracy)
    if not table.row_count:
        raise ValueError(f"there are no runs in {options.folder}")
    console.print(table)


def _report(options):
    folder = _run_folder(options.run)
    found = _read(folder)
    written = _draw(folder, found, options.save) if options.save else []
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


def _draw(folder, found, to):
    """Write the figures of a run: its own, or those of each variant and of all side by side."""
    paths = [path for name, (summary, curves) in found.items() for path in plots.draw(summary, curves, to / name)]
    if "" not in found and found:
        paths += plots.draw(report.side_by_side(runs.read_recipe(folder)["name"], _document(found)), {}, to)
    return paths


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
    for path in figures:
        if path.suffix == ".png":
            console.print(f"figure: {path}", soft_wrap=True)


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


def _assignment(text):
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()
