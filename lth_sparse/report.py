"""What a run found: rows over trials, curves, and the first seed's JSON files."""

from pathlib import Path

from . import runs

_MEASURES = {
    "early_stop_iteration": lambda result: result["early_stop"]["iteration"],
    "validation_accuracy": lambda result: result["early_stop"]["validation_accuracy"],
    "test_accuracy": lambda result: result["early_stop"]["test_accuracy"],
    "final_test_accuracy": lambda result: result["final"]["test_accuracy"],
    "train_accuracy": lambda result: result["train_accuracy"],
    "seconds": lambda result: result["seconds"],
}
_EXPORTS = {"ticket": "data.json", "random": "data_random.json", "reinit-chain": "data_reinit.json"}


def results(run: Path) -> list[dict]:
    """Every finished round's result.json, by arm, trial and round.

    Raises:
        ValueError: `run` is no run folder, or a file in it is damaged.
    """
    if not (run / "recipe.json").is_file():
        raise ValueError(f"{run} is not a run folder: it has no recipe.json")
    found = [runs.read_json(path) for path in sorted(run.glob("*/trial_*/round_*/result.json"))]
    arms = runs.read_json(run / "recipe.json")["settings"]["arms"]
    return sorted(found, key=lambda result: (arms.index(result["arm"]), result["trial"], result["round"]))


def summarize(run: Path) -> dict:
    """Name, settings, environment and status of a run, and a row per arm and round.

    Accuracies are fractions, taken at early stop unless named otherwise; each measure is {"mean", "min", "max"} over
    the row's `n` trials. `status` counts rounds that are done and planned, and names arms that ended early.
    """
    recipe, found = runs.read_json(run / "recipe.json"), results(run)
    settings = recipe["settings"]
    groups: dict[tuple, list[dict]] = {}
    for result in found:
        groups.setdefault((result["arm"], result["round"]), []).append(result)
    early = [
        f"{r['arm']} trial {r['trial']}: {r['status']} at round {r['round']}" for r in found if r["status"] != "done"
    ]
    planned = (settings["rounds"] + 1) * settings["trials"] * len(settings["arms"])
    return {
        **recipe,
        "environment": runs.read_json(run / "environment.json"),
        "status": {"done": len(found), "planned": planned, "ended_early": early},
        "winning_ticket": _winner(found),
        "rows": [_row(arm, round, group) for (arm, round), group in groups.items()],
    }


def curves(run: Path) -> dict[str, dict[int, dict]]:
    """Test accuracy over iterations by arm and round: `iteration` [n] and `test_accuracy` mean, min and max [n]."""
    histories: dict[tuple, list[list[dict]]] = {}
    density = {}
    for result in results(run):
        key = (result["arm"], result["round"])
        density[key] = result["density"]
        folder = runs.round_folder(run, result["arm"], result["trial"], result["round"])
        histories.setdefault(key, []).append(runs.read_rows(folder / "metrics.jsonl"))
    drawn: dict[str, dict[int, dict]] = {}
    for (arm, round), trials in histories.items():
        evaluations = list(zip(*trials, strict=False))  # a diverged trial is shorter
        drawn.setdefault(arm, {})[round] = {
            "density": density[arm, round],
            "iteration": [rows[0]["iteration"] for rows in evaluations],
            "test_accuracy": _columns([_spread([row["test_accuracy"] for row in rows]) for rows in evaluations]),
        }
    return drawn


def export(run: Path, folder: Path) -> list[Path]:
    """Write data.json, data_random.json and data_reinit.json as the TU Delft reproduction does; returns their paths.

    Accuracies and losses have shape [levels][trials][evaluations]. data_reinit.json holds the arm reinit-chain (the
    masks come from the reinitialised network itself), or reinit where only that was run.
    """
    settings, found = runs.read_json(run / "recipe.json")["settings"], results(run)
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

    histories = [
        [
            runs.read_rows(runs.round_folder(run, r["arm"], r["trial"], r["round"]) / "metrics.jsonl")
            for r in found
            if r["round"] == level
        ]
        for level in levels
    ]
    return {
        "VALIDATION_ITERATIONS": settings["evaluate_every"],
        "PRUNE_RATE": settings["prune_rate_fc"],
        "PM_LIST": [round(100 * density[level], 1) for level in levels],
        "weights_remaining_rates": [density[level] for level in levels],
        "test_accuracies": column("test_accuracy"),
        "test_losses": column("test_loss"),
        "val_accuracies": column("validation_accuracy"),
        "val_losses": column("validation_loss"),
    }


def _row(arm, round, group) -> dict:
    measures = {name: _spread([measure(result) for result in group]) for name, measure in _MEASURES.items()}
    return {"arm": arm, "round": round, "density": group[0]["density"], "n": len(group), **measures}


def _winner(found) -> dict | None:
    """The sparsest ticket of trial 0 that is at least as accurate on validation as the dense network, at early stop."""
    trained = [r for r in found if r["arm"] == "ticket" and r["trial"] == 0 and r["status"] != "diverged"]
    tickets = {r["round"]: r for r in trained}
    if 0 not in tickets:
        return None
    accuracy = {round: result["early_stop"]["validation_accuracy"] for round, result in tickets.items()}
    winner = tickets[max(round for round in accuracy if accuracy[round] >= accuracy[0])]
    early_stop = {"early_stop": winner["early_stop"], "dense": tickets[0]["early_stop"]}
    return {"round": winner["round"], "density": winner["density"], **early_stop}


def _spread(values) -> dict:
    values = [value for value in values if value is not None]  # what was not finite
    if not values:
        return {"mean": None, "min": None, "max": None}
    return {"mean": sum(values) / len(values), "min": min(values), "max": max(values)}


def _columns(rows) -> dict[str, list]:
    return {key: [row[key] for row in rows] for key in ("mean", "min", "max")}
