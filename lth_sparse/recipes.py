"""Recipe files: TOML with the settings of one run, or of several variants that are compared."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from itertools import filterfalse
from pathlib import Path
from typing import NamedTuple

from .claims import load
from .recipe import Recipe, digest, parse, unknown

_TEXTS = ("source", "cost")


class Experiment(NamedTuple):
    """What a recipe file asks for: a Recipe by the name of each variant, the only one of many files being "".

    `source` says where it is from, `cost` how long it takes, `claims` which of the papers' claims it decides.
    """

    name: str
    source: str
    cost: str
    claims: tuple[str, ...]
    variants: dict[str, Recipe]

    def settings(self) -> dict[str, dict]:
        """Those of every variant."""
        return {name: recipe.settings() for name, recipe in self.variants.items()}

    def identity(self) -> str:
        """Eight hexadecimal digits that differ when any setting of any variant does."""
        return digest(self.settings())


def known() -> dict[str, Path]:
    """The recipes that come with the library, by name."""
    found = sorted(files("lth_sparse.experiments").iterdir(), key=lambda path: path.name)
    return {path.stem: path for path in found if path.suffix == ".toml"}


def find(given: str) -> Path:
    """The file of a recipe by its name or path; ValueError where there is none."""
    path = known().get(given, Path(given))
    if not path.is_file():
        raise ValueError(unknown("recipe", given, known()))
    return path


def is_name(text: str) -> bool:
    """Whether `text` can name a folder in a folder: none that leads out of it."""
    return text not in ("", ".", "..") and not set(text) & {"/", "\\", "\0"}


def read(path: Path, scale: str | None = None, /, **changes) -> Experiment:
    """What a file asks for: `[settings]` changed by `[variant.NAME]`, by `[scale.NAME]`, by that one's
    `[scale.NAME.variant.NAME]`, and by `changes`. The change `variant` names the only one to run.

    Raises:
        ValueError: not TOML, an unknown entry, setting, scale or variant, or a value out of range.
    """
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{path} is not a recipe in TOML: {error}") from error
    settings, variants, scales = _tables(document, path)
    if scale is not None and scale not in scales:
        raise ValueError(f"{path} has no scale {scale!r}: choose from {', '.join(scales) or 'none'}")
    scaled = dict(scales.get(scale, {}))
    own = scaled.pop("variant", {})
    for name in own:
        if name not in variants:
            raise ValueError(unknown(f"variant in scale {scale!r} of {path}:", name, variants))
    only = changes.pop("variant", None)
    if only is not None and only not in variants:
        raise ValueError(unknown(f"variant of {path}:", only, variants))
    found = {
        name: parse({**settings, **variant, **scaled, **own.get(name, {}), **changes})
        for name, variant in (variants or {"": {}}).items()
        if only in (None, name)
    }
    name = "-".join(part for part in (path.stem, only, scale) if part)
    texts = (document.get(key, "") for key in _TEXTS)
    return Experiment(name, *texts, tuple(document.get("claims", ())), found)


def _tables(document, path) -> tuple[Mapping, Mapping, Mapping]:
    tables = [document.get(name, {}) for name in ("settings", "variant", "scale")]
    nested = [value for table in tables[1:] if isinstance(table, dict) for value in table.values()]
    entries = (*_TEXTS, "claims", "settings", "variant", "scale")
    strange = [name for name in document if name not in entries]
    strange += [name for name in _TEXTS if not isinstance(document.get(name, ""), str)]
    claimed = document.get("claims", [])
    strange += [] if isinstance(claimed, list) else ["claims"]
    if strange or not all(isinstance(table, dict) for table in tables + nested):
        got = strange[0] if strange else "a value in place of a table"
        raise ValueError(f"{path} may hold {', '.join(entries[:4])}, [variant.NAME] and [scale.NAME], got {got}")
    for name in filterfalse(is_name, tables[1]):
        raise ValueError(f"{path} has a variant {name!r}, which cannot be the name of its folder")
    ids = load() if claimed else {}
    for claim in claimed:
        if claim not in ids:
            raise ValueError(unknown(f"claim in {path}:", claim, ids))
    return tuple(tables)
