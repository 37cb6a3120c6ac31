"""The command line of `lth`: its commands and their options."""

import argparse
from dataclasses import fields
from pathlib import Path

from . import __version__, recipe


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message} (see {self.prog} --help)")


def parser() -> argparse.ArgumentParser:
    """What reads a command line; `command` is then the name of the command. Errors are ValueErrors of one sentence."""
    whole = _Parser("lth", description="Find winning tickets, and train them sparse.")
    whole.add_argument("--version", action="version", version=f"lth-sparse {__version__}")
    verbs = whole.add_subparsers(title="commands", dest="command", required=True, metavar="COMMAND")
    _add_find_ticket(verbs)
    _add_run(verbs)
    merge = verbs.add_parser("merge", help="bring the shards of a run together")
    merge.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a shard")
    merge.add_argument("--out", type=Path, metavar="DIR", help="the whole run (runs/NAME--IDENTITY)")
    _add_quiet(merge)
    ls = verbs.add_parser("ls", help="list what ran")
    ls.add_argument("folder", nargs="?", default="runs", type=Path, metavar="DIR", help="where the runs are (runs)")
    _add_json(ls, "them")
    for verb, text in [("report", "print the table of a run"), ("plot", "draw its figures")]:
        sub = verbs.add_parser(verb, help=text)
        sub.add_argument("run", metavar="RUN", help="a run folder, or the start of its name in runs/")
        if verb == "report":
            sub.add_argument("--export", type=Path, metavar="DIR", help="write data.json, data_random.json, ... there")
            sub.add_argument("--save", type=Path, metavar="DIR", help="write summary.json and the figures there")
        _add_json(sub, "what it finds")
    _add_bench(verbs)
    env = verbs.add_parser("env", help="versions, device, and what can run here")
    env.add_argument("--determinism", action="store_true", help="train a small network twice and compare the bits")
    _add_json(env, "them")
    return whole


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """What a command line, that of the process unless given, asks for; ValueError where it cannot be read.

    `words` of find-ticket and run may stand before, between and after the options, which argparse does not know.
    """
    reader = parser()
    options, others = reader.parse_known_args(arguments)
    if others and (not hasattr(options, "words") or any(other.startswith("-") for other in others)):
        reader.error(f"unrecognized arguments: {' '.join(others)}")
    if others:
        options.words += others
    return options


def assignment(text: str) -> tuple[str, str]:
    """Key and value of "KEY=VALUE"; ValueError without the sign."""
    key, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set takes KEY=VALUE, got {text!r}")
    return key.strip(), value.strip()


def _add_find_ticket(verbs):
    find = verbs.add_parser("find-ticket", help="the main job: prune iteratively, with controls")
    find.add_argument("words", nargs="*", metavar="MODEL DATASET [DATA_DIR]", help="DATA_DIR is datasets unless given")
    for f in fields(recipe.Recipe):
        choices = f"; one of {', '.join(f.metadata['choices'])}" if f.metadata.get("choices") else ""
        flags = ("--" + f.name.replace("_", "-"), *f.metadata["aliases"])
        find.add_argument(*flags, dest=f.name, metavar="X", help=f.metadata["help"] + choices)
    _add_output(find)


def _add_run(verbs):
    run = verbs.add_parser("run", help="run an experiment; again to go on where it stopped")
    words = "RECIPE is a name from --list, or the path of a TOML file; DATA_DIR is datasets unless given"
    run.add_argument("words", nargs="*", metavar="RECIPE [DATA_DIR]", help=words)
    run.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting, or the scale")
    run.add_argument(
        "--reuse",
        action="append",
        default=[],
        type=Path,
        metavar="RUN",
        help="take over the rounds of a run with other arms, rounds or trials; may be given again for more runs",
    )
    run.add_argument("--list", action="store_true", help="list the recipes")
    _add_output(run)


def _add_bench(verbs):
    bench = verbs.add_parser("bench", help="measure what sparse training gains, and where it loses")
    levels = {"choices": ("smoke", "core", "full"), "default": "smoke"}
    bench.add_argument("--level", **levels, help="smoke (3 minutes), core (9 minutes on a GPU) or full (hours)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="records and figures (runs/bench-LEVEL-DEVICE)")
    bench.add_argument("--device", choices=("cpu", "cuda"), help="cuda where there is a GPU")
    _add_json(bench, "the records")


def _add_output(sub):
    sub.add_argument("--out", type=Path, metavar="DIR", help="the run folder (runs/NAME--IDENTITY)")
    sub.add_argument("--shard", metavar="I/N", help="run the I-th of N parts, while other processes run the others")
    _add_quiet(sub)


def _add_quiet(sub):
    sub.add_argument("--quiet", action="store_true", help="no progress, no table")
    _add_json(sub, "the summary")


def _add_json(sub, what):
    sub.add_argument("--json", action="store_true", help=f"print {what} as one JSON document on stdout")
