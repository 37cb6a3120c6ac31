"""Disturb runs again and again, and see that each comes to the bytes of one that nothing disturbed.

python tests/soak.py --times 100 [--seed 0] [--kinds SIGKILL SIGTERM SIGINT]

A run is killed, interrupted, given a full disk, or has a file truncated or a bit of it flipped between two sittings.
Then the same command must go on to the same bytes, or refuse in one sentence that names the damaged file; no round
that was finished may be lost. Every sitting is a forked `lth run`, so that a hundred cases take minutes.
"""

import argparse
import contextlib
import errno
import importlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from run_folders import content, differing

from lth_sparse import cli
from lth_sparse.training import group

COMMON = 'dataset = "digits"\niterations = 6\nevaluate_every = 2\ndevice = "cpu"\nthreads = 1\n'
RECIPES = {
    "controls": '[settings]\nrounds = 2\narms = ["ticket", "reinit", "random"]\n',
    "rewound": '[settings]\nrounds = 2\narms = ["ticket", "one-shot", "redraw"]\nrewind = 3\n',
    "conv-2": '[settings]\nmodel = "conv-2"\nrounds = 1\narms = ["ticket"]\nbatch_size = 8\nvalidation_size = 1200\n',
    "learned": '[settings]\nrounds = 2\narms = ["ticket"]\nlearn_masks = 2\n',
    "variants": '[settings]\nrounds = 1\n[variant.sgd]\noptimizer = "sgd"\nlr = 0.1\n[variant.adam]\n',
}
SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
FULL = ("full disk: write", "full disk: fsync", "full disk: replace")
DAMAGE = ("truncated file", "flipped bit", "report of a truncated file", "report of a flipped bit")
KINDS = (*SIGNALS, *FULL, *DAMAGE)
TIMED = 100.0  # seconds that a sitting may last: a hang is a failure


class Broken(AssertionError):
    """A promise was not kept; the sentence says which."""


class Soak:
    """Cases in a folder: `disturb` a run in one of the ways of `KINDS`; `counts` is what became of them."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.draw, self.counts = folder, random.Random(seed), Counter()
        self.whole, self.length = {}, {}

    def disturb(self, kind: str, recipe: str) -> None:
        """One case.

        Raises:
            Broken: other bytes, a traceback, a lost round, a wrong exit code, or no name of the damaged file.
        """
        self._make_whole(recipe)
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        if kind.startswith("report"):
            shutil.copytree(self.folder / f"whole-{recipe}", run)
            self._damage(kind, run, ["report", str(run)], (".json", ".jsonl"))
        elif kind in DAMAGE:
            self._sit(kind, recipe, run, self._stopping(recipe, signal.SIGKILL))
            if any(path.suffix in (".json", ".safetensors") for path in run.rglob("*")):
                self._damage(kind, run, self._command(recipe, run), (".json", ".jsonl", ".safetensors"))
        else:
            for _ in range(self.draw.randint(1, 3)):
                before = _finished(run)
                disturbed = self._stopping(recipe, SIGNALS[kind]) if kind in SIGNALS else self._full_disk(kind)
                self._sit(kind, recipe, run, disturbed)
                if not before.items() <= _finished(run).items():
                    raise Broken(f"{kind}, {recipe}: a finished round was lost")
        self._goes_on(kind, recipe, run)
        self.counts[kind, "cases"] += 1

    def _make_whole(self, recipe):
        if recipe not in self.whole:
            (self.folder / f"{recipe}.toml").write_text(
                RECIPES[recipe].replace("[settings]\n", "[settings]\n" + COMMON)
            )
            run = self.folder / f"whole-{recipe}"
            for warm in (False, True):  # the second time nothing is imported
                shutil.rmtree(run, ignore_errors=True)
                begin, modules = time.monotonic(), self.folder / "modules"
                code, said = _sitting(self._command(recipe, run), modules=modules)
                if code:
                    raise Broken(f"{recipe} does not run: {said}")
                if not warm:
                    _import(modules.read_text().split())
            self.whole[recipe], self.length[recipe] = content(run), time.monotonic() - begin

    def _command(self, recipe, run):
        return ["run", str(self.folder / f"{recipe}.toml"), "--out", str(run), "--quiet"]

    def _stopping(self, recipe, number):
        return {"number": number, "after": self.draw.uniform(0.02, 0.9) * self.length[recipe]}

    def _full_disk(self, kind):
        return {"full": (kind.rpartition(" ")[2], self.draw.randint(1, 60), self.draw.random())}

    def _sit(self, kind, recipe, run, disturbed):
        code, said = _sitting(self._command(recipe, run), **disturbed)
        stopped = {signal.SIGKILL: -9, None: 1}.get(disturbed.get("number"), 130)
        if code not in (0, stopped) or (code in (1, 130) and not _is_sentence(said)):
            raise Broken(f"{recipe}, {disturbed}: exit code {code}, {said}")
        self.counts[kind, "sittings"] += 1
        self.counts[kind, "stopped"] += code != 0

    def _damage(self, kind, run, command, suffixes):
        """Damage a file, see what the command says to it, and put it back as a backup would."""
        files = [path for path in sorted(run.rglob("*")) if path.suffix in suffixes and path.stat().st_size]
        path = self.draw.choice(files)
        before = path.read_bytes()
        at = self.draw.randrange(len(before))
        flipped = bytes([before[at] ^ 1 << self.draw.randrange(8)])
        path.write_bytes(before[:at] if "truncated" in kind else before[:at] + flipped + before[at + 1 :])
        rounds = _finished(run) if command[0] == "run" else {}
        code, said = _sitting(command)
        if code == 2 and _is_sentence(said) and path.name in said and "damaged" in said:
            self.counts[kind, "named"] += 1
            path.write_bytes(before)
        elif code or "Traceback" in said:
            raise Broken(f"{kind} of {path} at {at}: exit code {code}, {said}")
        elif command[0] == "report":  # which does not read it
            path.write_bytes(before)
        if (
            command[0] == "run"
            and not {k: v for k, v in rounds.items() if k != str(path)}.items() <= _finished(run).items()
        ):
            raise Broken(f"{kind} of {path}: a finished round was lost")

    def _goes_on(self, kind, recipe, run):
        code, said = _sitting(self._command(recipe, run))
        if code:
            raise Broken(f"{kind}, {recipe}: does not go on: exit code {code}, {said}")
        other = differing(content(run), self.whole[recipe])
        if other:
            raise Broken(f"{kind}, {recipe}: other bytes in {', '.join(other)}")


def _finished(run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("result.json")}


def _is_sentence(said) -> bool:
    return said.startswith("lth: ") and said.count("\n") == 1


def _import(names):
    """What a fork would import itself, again and again."""
    for name in names:
        if name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)


def _sitting(command, number=None, after=0.0, full=None, modules=None) -> tuple[int, str]:
    """Exit code (that of a signal negative) and stderr of `lth command` in a fork, disturbed as asked."""
    with tempfile.TemporaryFile("w+") as said:
        pid = os.fork()
        if not pid:
            code = _sit_down(command, said, full)
            if modules:
                modules.write_text("\n".join(sys.modules))
            os._exit(code)
        if number:
            time.sleep(after)
            os.kill(pid, number)
        deadline = time.monotonic() + TIMED
        while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
            if time.monotonic() > deadline:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                raise Broken(f"{command} hangs")
            time.sleep(0.005)
        said.seek(0)
        return os.waitstatus_to_exitcode(ended[1]), said.read()


def _sit_down(command, said, full) -> int:
    """Run the command in this process, its state saved at every step, and no figures drawn."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are begun with it ignored
    group.SAVE_SECONDS, group.STEPS = 0.01, 1
    cli.plots.draw = lambda *arguments: []
    cli.console.file = said
    if full:
        _fill_the_disk(*full)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            return cli.main(command)
    except BaseException:
        import traceback

        traceback.print_exc(file=said)
        return 99
    finally:
        said.flush()


def _fill_the_disk(call, last, part):
    """Let the `last`-th call and all after it fail; a write leaves only `part` of the file."""
    name, calls = ("fsync" if call == "write" else call), [0]
    real = getattr(os, name)

    def full(*arguments):
        calls[0] += 1
        if calls[0] < last:
            return real(*arguments) if name == "replace" else None
        if call == "write":
            os.ftruncate(arguments[0], int(part * os.fstat(arguments[0]).st_size))
        raise OSError(errno.ENOSPC, "No space left on device")

    setattr(os, name, full)


def soak(folder: Path, times: int, seed: int = 0, seconds: float = float("inf"), kinds=KINDS) -> Counter:
    """`times` cases, each kind and each recipe in its turn, or as many as fit in `seconds`; what became of them."""
    found, begin = Soak(folder, seed), time.monotonic()
    for number in range(times):
        if time.monotonic() - begin > seconds:
            break
        found.disturb(kinds[(number + seed) % len(kinds)], found.draw.choice(list(RECIPES)))
    return found.counts


def table(counts: Counter) -> str:
    """What was survived, as Markdown."""
    head = ("disturbance", "cases", "the same bytes in the end", "sittings cut short", "refused first, the file named")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    kinds = [kind for kind in KINDS if counts[kind, "cases"]]
    for name, some in [*((kind, [kind]) for kind in kinds), ("all", kinds)]:
        cases, sittings, stopped, named = (
            sum(counts[kind, what] for kind in some) for what in ("cases", "sittings", "stopped", "named")
        )
        of = f"{stopped} of {sittings}" if sittings else "-"
        lines.append(f"| {name} | {cases} | {cases} | {of} | {named if {*some} & {*DAMAGE} else '-'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--times", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        try:
            counts = soak(Path(folder), options.times, options.seed, options.seconds, options.kinds)
        except Broken as broken:
            print(f"seed {options.seed}: {broken}", file=sys.stderr)
            return 1
    print(table(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
