"""What a run found: rows over trials, curves, and the JSON files of the TU Delft reproduction."""

from pathlib import Path
from types import NoneType

from . import runs

_MEASURES = {
    "early_stop_iteration": lambda result: result["early_stop"]["iteration"],
    "validation_accuracy": lambda result: result["early_stop"]["validation_accuracy"],
    "test_accuracy": lambda result: result["early_stop"]["test_accuracy"],
    "validation_loss": lambda result: result["early_stop"]["validation_loss"],
    "test_loss": lambda result: result["early_stop"]["test_loss"],
    "final_test_accuracy": lambda result: result["final"]["test_accuracy"],
    "train_accuracy": lambda result: result["train_accuracy"],
    "seconds": lambda result: result["seconds"],
}
_OBSERVED = ("zeros", "untrained_accuracy", "barrier", "joules")  # in some results only
_CURVES = ("test_accuracy", "validation_accuracy", "validation_loss", "test_loss", "train_loss")
_BY_LAYER = ("sign_changes", "dead_units")  # what diverged at once has none
_NUMBER = (int, float, NoneType)  # None is what was not finite
_ROW = {"iteration": int, "test_loss": _NUMBER, "validation_loss": _NUMBER, "train_loss": _NUMBER}
_ROW |= {"test_accuracy": _NUMBER, "validation_accuracy": (int, float)}
_RESULT = {"arm": str, "trial": int, "round": int, "status": str, "density": (int, float), "kept": {str: [int]}}
_RESULT |= {"early_stop": _ROW, "final": _ROW, "train_accuracy": _NUMBER, "seconds": (int, float)}
_SAVED = {"status": {"done": int, "planned": int}}
_EXPORTS = {"ticket": "data.json", "random": "data_random.json", "reinit-chain": "data_reinit.json"}


def results(run: Path) -> list[dict]:
    """Every finished round's result.json, by arm, trial and round.

    Raises:
        ValueError: `run` is no run folder, or a file in it is damaged.
    """
    arms = runs.read_recipe(run)["settings"]["arms"]
    found = [read_result(run, path, arms) for path in sorted(run.glob("*/trial_*/round_*/result.json"))]
    return sorted(found, key=lambda result: (arms.index(result["arm"]), result["trial"], result["round"]))


def read_result(run: Path, path: Path, arms: list[str]) -> dict:
    """The result.json at `path` of one of these arms of a run.

    Raises:
        ValueError: it is damaged, is of another round, or has no numbers where others compute with them.
    """
    found = runs.read_json(path, _RESULT)
    here = path.parent == runs.round_folder(run, found["arm"], found["trial"], found["round"])
    kept = all(len(counts) == 2 and counts[1] > 0 for counts in found["kept"].values())
    observed = runs.fits({name: found.get(name) for name in _OBSERVED}, {str: _NUMBER})
    observed &= runs.fits([found.get(name, {}) for name in _BY_LAYER], [{str: (int, float)}])
    if not here or not kept or not observed or found["arm"] not in arms:
        raise ValueError(f"{path} is damaged: it does not hold what such a file does")
    return found


def summarize(run: Path) -> dict:
    """Name, settings, environment and status of a run, and a row per arm and round.

    Accuracies are fractions, taken at early stop unless named otherwise; each measure is {"mean", "min", "max"} over
    the row's `n` trials. `status` counts rounds that are done and planned, and names arms that ended early.
    """
    recipe, found = runs.read_recipe(run), results(run)
    settings = recipe["settings"]
    groups: dict[tuple, list[dict]] = {}
    for result in found:
        groups.setdefault((result["arm"], result["round"]), []).append(result)
    early = [
        f"{r['arm']} trial {r['trial']}: {r['status']} at round {r['round']}" for r in found if r["status"] != "done"
    ]
    planned = (settings["rounds"] + 1) * settings["trials"] * len(settings["arms"])
    rows = [_row(arm, round, group) for (arm, round), group in groups.items()]
    supermasks = _supermasks(run, rows, settings)
    return {
        **recipe,
        **({"supermasks": supermasks, "n": settings["trials"]} if supermasks else {}),
        "environment": runs.read_json(run / "environment.json"),
        "status": {"done": len(found), "planned": planned, "ended_early": early},
        "winning_ticket": winner(found),
        "rows": rows,
    }


def variants(run: Path) -> dict[str, Path]:
    """The folders of a run's variants by name, or the run itself as "", those that have not begun left out.

    Raises:
        ValueError: `run` is no run folder.
    """
    names = runs.read_recipe(run).get("variants")
    if names is None:
        return {"": run}
    return {name: run / name for name in names if (run / name / "recipe.json").is_file()}


def saved(recipe: Path) -> str:
    """The state of what is committed beside a recipe's file, in results/NAME: "-" where there is nothing."""
    found = sorted((recipe.parent / "results" / recipe.stem).rglob("summary.json"))
    done, planned = (sum(runs.read_json(path, _SAVED)["status"][key] for path in found) for key in ("done", "planned"))
    return f"{done} of {planned} rounds" if found else "-"


def side_by_side(name: str, summaries: dict[str, dict]) -> dict:
    """A summary whose rows are those of each variant's first arm, under the variant's name: what figures compare."""
    rows = [
        row | {"arm": variant}
        for variant, summary in summaries.items()
        for row in summary["rows"]
        if row["arm"] == summary["settings"]["arms"][0]
    ]
    first = next(iter(summaries.values()))
    return first | {"rows": rows, "title": f"{name}: the arm {first['settings']['arms'][0]} of each variant"}


def curves(run: Path) -> dict[str, dict[int, dict]]:
    """By arm and round: `density`, `iteration` [n], and the mean, min and max [n] over trials of what was evaluated.

    That is test_accuracy, validation_accuracy, validation_loss, test_loss and train_loss; None where none is finite.
    """
    histories: dict[tuple, list[list[dict]]] = {}
    density = {}
    for result in results(run):
        key = (result["arm"], result["round"])
        density[key] = result["density"]
        histories.setdefault(key, []).append(_history(run, result))
    drawn: dict[str, dict[int, dict]] = {}
    for (arm, round), trials in histories.items():
        evaluations = list(zip(*trials, strict=False))  # a diverged trial is shorter
        drawn.setdefault(arm, {})[round] = {
            "density": density[arm, round],
            "iteration": [rows[0]["iteration"] for rows in evaluations],
            **{key: _columns([_spread([row[key] for row in rows]) for rows in evaluations]) for key in _CURVES},
        }
    return drawn


def export(run: Path, folder: Path) -> list[Path]:
    """Write data.json, data_random.json and data_reinit.json as the TU Delft reproduction does; returns their paths.

    Accuracies and losses have shape [levels][trials][evaluations]. data_reinit.json holds the arm reinit-chain (the
    masks come from the reinitialised network itself), or reinit where only that was run.
    """
    settings, found = runs.read_recipe(run)["settings"], results(run)
    arms = {result["arm"] for result in found}
    files = {arm: name for arm, name in _EXPORTS.items() if arm in arms}
    if "reinit" in arms and "reinit-chain" not in arms:
        files["reinit"] = _EXPORTS["reinit-chain"]
    folder.mkdir(parents=True, exist_ok=True)
    for arm, name in files.items():
        runs.write_json(folder / name, _exported(run, settings, [r for r in found if r["arm"] == arm]))
    return [folder / name for name in files.values()]


def _exported(run, settings, found) -> dict:
    levels = sorted({result["round"] for result in found})
    density = {result["round"]: result["density"] for result in found}

    def column(key):
        return [[[row[key] for row in rows] for rows in level] for level in histories]

    histories = [[_history(run, result) for result in found if result["round"] == level] for level in levels]
    return {
        "VALIDATION_ITERATIONS": settings.get("evaluate_every"),
        "PRUNE_RATE": settings.get("prune_rate_fc"),
        "PM_LIST": [round(100 * density[level], 1) for level in levels],
        "weights_remaining_rates": [density[level] for level in levels],
        "test_accuracies": column("test_accuracy"),
        "test_losses": column("test_loss"),
        "val_accuracies": column("validation_accuracy"),
        "val_losses": column("validation_loss"),
    }


def _history(run, result) -> list[dict]:
    folder = runs.round_folder(run, result["arm"], result["trial"], result["round"])
    return runs.read_rows(folder / "metrics.jsonl", result.get("metrics"), _ROW)


def _row(arm, round, group) -> dict:
    measures = {name: _spread([measure(result) for result in group]) for name, measure in _MEASURES.items()}
    for name in _OBSERVED:
        found = [result[name] for result in group if result.get(name) is not None]
        measures |= {name: _spread(found)} if found else {}
    measures |= {name: found for name in _BY_LAYER if (found := _by_layer(name, group))}
    weights = sum(kept for kept, _ in group[0]["kept"].values())
    measures["densities"] = {layer: kept / whole for layer, (kept, whole) in group[0]["kept"].items()}
    return {"arm": arm, "round": round, "density": group[0]["density"], "weights": weights, "n": len(group), **measures}


def _by_layer(name, group):
    """The mean over the trials that have it for each layer."""
    found = [result[name] for result in group if result.get(name)]
    layers = found[0] if found else ()
    return {layer: sum(numbers.get(layer, 0) for numbers in found) / len(found) for layer in layers}


def _supermasks(run, rows, settings) -> dict:
    """Test accuracies of untrained networks: of heuristic masks at their best level, and of learned ones."""
    found = {}
    score = settings.get("score", "magnitude")
    heuristic = {"ticket": score, "constant-sign": f"{score}-constant"}
    for arm, name in heuristic.items():
        levels = [row["untrained_accuracy"] for row in rows if row["arm"] == arm and "untrained_accuracy" in row]
        found |= {name: max(levels, key=lambda level: level["mean"])} if levels else {}
    learned: dict[str, list[float]] = {}
    for path in sorted(run.glob("learned*/trial_*/round_00/mask.json")):
        mask = runs.read_json(path, {"mask": str, "test_accuracy": _NUMBER})
        learned.setdefault(mask["mask"], []).append(mask["test_accuracy"])
    return found | {name: _spread(accuracies) for name, accuracies in learned.items()}


def winner(found: list[dict], trial: int = 0) -> dict | None:
    """The sparsest ticket of a trial that is at least as accurate on validation as the dense network, at early stop.

    `found` are results as `results` returns them; None where the dense network is not among them.
    """
    trained = [r for r in found if r["arm"] == "ticket" and r["trial"] == trial and r["status"] != "diverged"]
    tickets = {r["round"]: r for r in trained}
    if 0 not in tickets:
        return None
    accuracy = {round: result["early_stop"]["validation_accuracy"] for round, result in tickets.items()}
    best = tickets[max(round for round in accuracy if accuracy[round] >= accuracy[0])]
    early_stop = {"early_stop": best["early_stop"], "dense": tickets[0]["early_stop"]}
    return {"round": best["round"], "density": best["density"], **early_stop}


def _spread(values) -> dict:
    values = [value for value in values if value is not None]  # what was not finite
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def _columns(rows) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in ("mean", "min", "max")}
