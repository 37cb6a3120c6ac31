"""experiments/README.md: what it says of recipes and sources is there, and everything that it names exists."""

import argparse
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

import lth_sparse
from lth_sparse import actions, arguments, claims, data, models, prune, recipe, recipes, scores
from lth_sparse.arms import ARMS

HERE = Path(__file__).parents[1] / "experiments"
TEXT = (HERE / "README.md").read_text(encoding="utf-8")
ASKED = {"D": 13, "B": 8, "L": 7, "T": 6, "N": 8}  # things that each source asks for; some take several rows: L-7a
NAMES = {*recipes.known(), *ARMS, *scores.SCORES, *actions.KEPT, *actions.PRUNED, *prune.SCOPES, *data.NAMES}
NAMES |= {*models.NAMES, *claims.load()}


def rows(first: str) -> list[list[str]]:
    """The cells of every row of a table whose first cell matches."""
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in TEXT.splitlines() if line[:1] == "|"]
    return [row for row in cells if re.fullmatch(first, row[0])]


def named(text: str) -> list[str]:
    """What stands in backticks."""
    return re.findall(r"`([^`]+)`", text)


def commands() -> list[str]:
    return re.findall(r"^lth .+", TEXT, re.MULTILINE)


ROWS = {row[0]: row[1:] for row in rows(r"[A-Z]-\d+[a-z]?")}


def verbs() -> dict[str, argparse.ArgumentParser]:
    (found,) = [action for action in arguments.parser()._actions if isinstance(action.choices, dict)]
    return found.choices


def exists(thing: str) -> bool:
    """Whether `thing` is an option, a command that can be read, a file, an attribute, or a name of ours."""
    if thing.startswith("--"):
        option, _, value = thing.partition(" ")
        return any(option in verb._option_string_actions for verb in verbs().values()) and readable(option, value)
    if thing.startswith("lth "):
        return arguments.parse(shlex.split(thing)[1:]) is not None
    if "/" in thing or thing.endswith((".py", ".json", ".md")):
        return (HERE / thing).exists() or (HERE.parent / thing).exists()
    return thing in NAMES or attribute(thing)


def readable(option: str, value: str) -> bool:
    """Whether a recipe takes the option of find-ticket at that value; ValueError where it does not."""
    setting = verbs()["find-ticket"]._option_string_actions.get(option)
    known = setting is not None and setting.dest in recipe.Recipe.__dataclass_fields__
    return not value or not known or recipe.parse({setting.dest: value}) is not None


def attribute(dotted: str) -> bool:
    """`lth.prune_`, `report.export`, `training.Result.best`: a module of ours, and what can be had from it."""
    first, *rest = dotted.split(".")
    if first == "lth":
        return rest[0] in lth_sparse.__all__
    found = module(first)
    for name in rest:
        fields = getattr(found, "__dataclass_fields__", {})
        found = fields[name] if name in fields else getattr(found, name, None)
    return bool(rest) and found is not None


def module(name: str):
    try:
        return import_module(f"lth_sparse.{name}")
    except ImportError:
        return None


def test_every_recipe_has_its_row():
    table = {named(row[0])[0]: row for row in rows(r"`[\w-]+`")}
    assert list(table) == list(recipes.known())
    for name, (_, question, source, result) in table.items():
        assert question and source == recipes.read(recipes.known()[name]).source, name
        link = f"[results/{name}](results/{name})" if (HERE / "results" / name).exists() else ""
        assert result == link, name


@pytest.mark.parametrize("source", ASKED)
def test_everything_that_a_source_asks_for_has_a_row(source):
    numbers = [int(re.findall(r"\d+", row)[0]) for row in ROWS if row[0] == source]
    assert sorted(set(numbers)) == list(range(1, ASKED[source] + 1)) and numbers == sorted(numbers)
    assert len(ROWS) == len(rows(r"[A-Z]-\d+[a-z]?")) and {row[0] for row in ROWS} == set(ASKED)


@pytest.mark.parametrize("row", ROWS)
def test_what_answers_it_exists(row):
    asked, here, missing = ROWS[row]
    assert asked and named(here)
    assert [thing for thing in named(asked + here + missing) if not exists(thing)] == []


def test_what_does_not_exist_is_noticed():
    things = "--prun-rate", "lth.prune", "prune.prune", "prun.prune_", "figure2", "lth_sparse/prun.py", "Result.best"
    assert [thing for thing in things if exists(thing)] == []
    for thing in ("--model lenet400", "--rounds many", "lth fin-ticket"):
        with pytest.raises(ValueError):
            exists(thing)


@pytest.mark.parametrize("command", commands())
def test_the_commands_can_be_read(command):
    options = arguments.parse(shlex.split(command)[1:])
    if options.command == "run" and options.words:
        changes = dict(arguments.assignment(text) for text in options.set)
        assert recipes.read(recipes.find(options.words[0]), changes.pop("scale", None), **changes).variants
    if options.command == "find-ticket":
        settings = {name: getattr(options, name) for name in recipe.Recipe.__dataclass_fields__}
        asked = recipe.parse(settings)
        paper = recipe.parse({"model": asked.model, "dataset": asked.dataset})
        for name in ("iterations", "batch_size", "lr", "prune_rate_fc", "prune_rate_conv", "evaluate_every"):
            assert getattr(asked, name) == getattr(paper, name), name


def test_the_example_is_a_recipe(tmp_path):
    (tmp_path / "a.toml").write_text(re.search(r"```toml\n(.+?)```", TEXT, re.DOTALL)[1], encoding="utf-8")
    found = recipes.read(tmp_path / "a.toml", "smoke")
    assert {name: asked.warmup for name, asked in found.variants.items()} == {"warm": "5", "cold": "0"}
    assert {asked.dataset for asked in found.variants.values()} == {"digits"} and found.claims == ("LN1",)
