"""Wall-clock of the main job against two peers: the same protocol on the same device, round by round in turn.

    python -m lth_sparse.benchmarks.experiments [DATA_DIR] [--rounds 10] [--iterations 1000] [--device cpu] [--out FILE]

*plain* is `peers.plain`, what a user would write today. *engine-dense* is our engine with masks on dense weights, which
shows what the sparse kernels themselves add. LeNet-300-100 on MNIST, three arms, evaluation every 100 iterations.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import mean

import torch

from lth_sparse import data, experiment, lottery, recipe, training

from . import records
from .compare import failure
from .paired import ratio
from .peers import plain
from .providers import Unable
from .records import Record
from .shapes import Level

CASE = Record(name="find-ticket lenet-300-100 mnist, 3 arms", metric="seconds of a round", unit="s", precision="fp32")
PROVIDERS = ("plain", "engine-dense", "lth")


def section(level: Level, device: torch.device) -> Iterator[Record]:
    """As many rounds and iterations as the level affords (the paper's length is 50,000), if ./datasets has MNIST."""
    if level.experiment:
        try:
            yield from measured("datasets", *level.experiment, str(device))
        except (ValueError, RuntimeError) as error:
            yield CASE._replace(**failure(Unable(error)))


def measured(root: str, rounds: int, iterations: int, device: str) -> Iterator[Record]:
    """Seconds and accuracy of every round by provider, then how many times as fast as each peer `lth` is."""
    settings = dict(rounds=rounds, iterations=str(iterations), device=device, arms="ticket,reinit,random")
    sides = {
        "plain": plain.rounds(plain.mnist(root), iterations, 100, 60, device),
        "engine-dense": engine(root, strategy="masked", **settings),
        "lth": engine(root, **settings),
    }
    taken: dict[str, list[float]] = {name: [] for name in sides}
    shape = f"{iterations:,} iterations"
    for round in range(rounds + 1):
        density = round_density(round)
        for name, side in sides.items():
            begin = time.perf_counter()
            found = next(side)
            taken[name].append(time.perf_counter() - begin)
            case = CASE._replace(provider=name, shape=shape, density=density, n=1)
            yield case._replace(value=taken[name][-1])
            for arm, row in found.items():
                yield case._replace(metric=f"test accuracy of {arm}", unit="", value=row["accuracy"])
    for name in ("plain", "engine-dense"):
        yield _faster(name, taken, range(rounds + 1), shape, "all rounds")
        sparse = [round for round in range(rounds + 1) if round_density(round) < 0.1]
        if sparse:
            yield _faster(name, taken, sparse, shape, "rounds under 10% density")


def engine(root: str, **settings) -> Iterator[dict]:
    """Our own engine's rounds, as `plain.rounds` yields them."""
    asked = recipe.Recipe(**settings | {"arms": tuple(settings["arms"].split(","))})
    loaded = data.load("mnist", root, device=asked.device)
    asked = asked.resolve(len(loaded.train.labels))
    chains = experiment.chains(asked, loaded)
    for round in range(asked.rounds + 1):
        found = {}

        def record(chain, round, result, found=found):
            found[chain.arm] = {
                "accuracy": result.early_stop["test_accuracy"],
                "train_accuracy": result.train_accuracy,
            }

        lottery.take_round(chains, lambda tickets: training.train(tickets, loaded, asked), round, asked.rounds, record)
        yield found


def round_density(round: int) -> float:
    """Kept of LeNet-300-100's weights after so many prunings, by `plain.RATES`."""
    sizes = 784 * 300, 300 * 100, 100 * 10
    return sum(size * (1 - rate) ** round for size, rate in zip(sizes, plain.RATES, strict=True)) / sum(sizes)


def _faster(peer, taken, rounds, shape, which) -> Record:
    found = ratio([taken[peer][r] for r in rounds], [taken["lth"][r] for r in rounds])
    whole = sum(taken[peer][r] for r in rounds) / sum(taken["lth"][r] for r in rounds)
    metric = f"times as fast as {peer}, {which}"
    note = f"all together {whole:.2f}; {mean(taken['lth'][r] for r in rounds):.2f} s a round"
    numbers = {"value": found.median, "low": found.low, "high": found.high, "n": found.n}
    return CASE._replace(provider="lth", shape=shape, metric=metric, unit="", note=note, **numbers)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data_dir", nargs="?", default="datasets")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--iterations", type=int, default=1000)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    training.keep_freed_memory()
    said, found = records.origin(torch.device(options.device)), []
    for record in measured(options.data_dir, options.rounds, options.iterations, options.device):
        found.append(record._replace(section="experiments", **said))
        if "accuracy" not in record.metric:
            value = f"{record.value:.2f}" + (f" ({record.low:.2f} to {record.high:.2f})" if record.low else "")
            density = "" if record.density is None else f"{record.density:.1%}"
            sys.stdout.write(f"{density:>7} {record.provider:>13} {record.metric}: {value} {record.note}\n")
            sys.stdout.flush()
    if options.out:
        records.write(options.out, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
