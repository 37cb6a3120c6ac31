"""The `lth` command. Tables and progress go to stderr, one JSON document to stdout with --json.

Exit codes: 0 done; 1 failed while running; 2 arguments or input files; 130 interrupted, with the state saved.
"""

import argparse
import json
import signal
import tomllib
from dataclasses import fields
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from . import __path__ as package_path
from . import __version__, dispatch, experiment, ops, plots, recipe, report, runs, training
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
    _carry_out(recipe.parse(settings), data_dir, options, None)


def _run(options):
    if options.list or options.recipe is None:
        if not options.list:
            raise ValueError("run needs the name of a recipe: see lth run --list")
        _list_recipes(options)
        return
    path = _recipe_path(options.recipe)
    changes = dict(_assignment(text) for text in options.set)
    scale = changes.pop("scale", None)
    name = f"{path.stem}-{scale}" if scale else path.stem
    _carry_out(recipe.read(path, scale, **changes), options.data_dir, options, name)


def _carry_out(settings, data_dir, options, name):
    with Progress(settings, console, options.quiet) as progress:
        folder = experiment.run(settings, data_dir, options.out, name, progress.metrics, progress.round)
    summary = report.summarize(folder)
    figures = plots.draw(summary, report.curves(folder), folder / "figures")
    if not options.quiet:
        _print_summary(summary)
        _print_paths(folder, figures)
    if options.json:
        print(json.dumps(summary, indent=1))


def _ls(options):
    table = Table("run", "done", "winning ticket", "test accuracy", box=None)
    for path in sorted(options.folder.glob("*/recipe.json")) if options.folder.is_dir() else ():
        summary = report.summarize(path.parent)
        winner = summary["winning_ticket"]
        ticket = f"{winner['density']:.1%} of the weights" if winner else "-"
        accuracy = f"{winner['early_stop']['test_accuracy']:.2%}" if winner else "-"
        table.add_row(str(path.parent), "{done}/{planned}".format(**summary["status"]), ticket, accuracy)
    if not table.row_count:
        raise ValueError(f"there are no runs in {options.folder}")
    console.print(table)


def _report(options):
    folder = _run_folder(options.run)
    summary = report.summarize(folder)
    written = report.export(folder, options.export) if options.export else []
    if options.save:
        written += [*plots.draw(summary, report.curves(folder), options.save), options.save / "summary.json"]
        runs.write_json(written[-1], summary)
    for path in written:
        console.print(str(path), soft_wrap=True)
    _print_summary(summary)
    if options.json:
        print(json.dumps(summary, indent=1))


def _plot(options):
    folder = _run_folder(options.run)
    figures = plots.draw(report.summarize(folder), report.curves(folder), folder / "figures")
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


def _print_summary(summary):
    arms = summary["settings"]["arms"]
    rows = {(row["arm"], row["round"]): row for row in summary["rows"]}
    console.print(_title(summary), soft_wrap=True)  # as a table's title it would wrap at the width of the table
    table = Table("round", "weights", box=None)
    for arm in arms:
        table.add_column(f"{arm}\nstop at", justify="right")
        table.add_column("\ntest %", justify="right")
    for round in sorted({round for _, round in rows}):
        density = next(row["density"] for (_, r), row in rows.items() if r == round)
        cells = [cell for arm in arms for cell in _cells(rows.get((arm, round)))]
        table.add_row(str(round), f"{100 * density:.1f} %", *cells)
    console.print(table)
    for sentence in summary["status"]["ended_early"]:
        console.print(sentence)
    winner = summary["winning_ticket"]
    if winner:
        console.print(
            f"winning ticket: round {winner['round']}, {winner['density']:.1%} of the weights, test accuracy "
            f"{winner['early_stop']['test_accuracy']:.2%} (dense {winner['dense']['test_accuracy']:.2%})",
            soft_wrap=True,
        )


def _title(summary):
    settings, status = summary["settings"], summary["status"]
    trials = "1 trial" if settings["trials"] == 1 else f"mean (min-max) of {settings['trials']} trials"
    done = "" if status["done"] == status["planned"] else f", {status['done']} of {status['planned']} rounds done"
    return f"{settings['model']} on {settings['dataset']}, {trials}, at the early stop{done}"


def _cells(row):
    if row is None:
        return "-", "-"
    return _spread(row["early_stop_iteration"], row["n"], "{:,.0f}", 1), _spread(
        row["test_accuracy"], row["n"], "{:.2f}", 100
    )


def _spread(measure, n, form, factor):
    if measure["mean"] is None:
        return "-"
    mean, low, high = (form.format(factor * measure[key]) for key in ("mean", "min", "max"))
    return mean if n == 1 else f"{mean} ({low}-{high})"


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


def _recipes():
    folders = (Path(folder) / "experiments" for folder in package_path)
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.toml"))}


def _recipe_path(given):
    path = _recipes().get(given, Path(given))
    if not path.is_file():
        raise ValueError(f"unknown recipe {given!r}: give a path, or one of {', '.join(_recipes())}")
    return path


def _list_recipes(options):
    table = Table("recipe", "source", "cost", box=None)
    found = {name: tomllib.loads(path.read_text(encoding="utf-8")) for name, path in _recipes().items()}
    for name, document in found.items():
        table.add_row(name, document.get("source", ""), document.get("cost", ""))
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        console.print(table)


def _assignment(text):
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()
