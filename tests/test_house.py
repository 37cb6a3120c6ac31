"""The house itself: imports run downwards, importing is light, the wheel is complete, CI runs the README."""

import ast
import os
import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from zipfile import ZipFile

import pytest
import torch

ROOT = Path(__file__).parents[1]
FACADE = "lth_sparse"  # lth_sparse/__init__.py: above everything it exports, below the command line
FLOORS = {
    name: floor
    for floor, names in {
        5: "cli arguments __main__ progress",
        4.5: FACADE,
        4: "lottery arms training data models supermask runs report tables plots claims recipe recipes experiment "
        "across observations shards determinism",
        3: "convert packing prune structured checkpoint distributed measures",
        2: "scores actions nn masks hooks optim packed",
        1: "ops dispatch costs",
        0: "kernels",
    }.items()
    for name in names.split()
}
MAPPED = ("kernels", "experiments", "benchmarks")  # beside the package in a checkout, inside it in a wheel
LINES = 300
COMMANDS = {"pip install -e . && lth find-ticket lenet-300-100 digits", "pip install -e '.[test]' && pytest"}
HEAVY = ("torchvision", "triton", "matplotlib", "sklearn")


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def modules(root: Path) -> dict[str, Path]:
    """Every module in lth_sparse/ and kernels/ by its dotted name, as it is when installed."""
    found = {}
    for folder, package in (("lth_sparse", FACADE), ("kernels", f"{FACADE}.kernels")):
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            found[".".join((package, *parts)).removesuffix(".__init__")] = path
    return found


def imports(name: str, path: Path) -> set[str]:
    """Dotted names of all that a module imports, at its top or inside a function."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return found


def edges(root: Path) -> set[tuple[str, str]]:
    """Pairs (importer, imported) of the project's own modules; an imported function counts as its module."""
    known, found = modules(root), set()
    for importer, path in known.items():
        for imported in imports(importer, path):
            while imported and imported not in known:
                imported = imported.rpartition(".")[0]
            found |= {(importer, imported)} if imported else set()
    return found


def unit(name: str) -> str:
    """The entry of FLOORS that a module belongs to: `lth_sparse.kernels.pattern` lives in `kernels`."""
    return (name.split(".") + [FACADE])[1]


def floor(name: str) -> float:
    if unit(name) not in FLOORS:
        pytest.fail(f"{name} has no floor: give it one in the design's table and in FLOORS of {__file__}")
    return FLOORS[unit(name)]


def upwards(root: Path) -> list[tuple[str, str]]:
    return [(importer, imported) for importer, imported in edges(root) if floor(imported) > floor(importer)]


def cycle(pairs) -> list[str]:
    sorter = TopologicalSorter()
    for importer, imported in pairs:
        sorter.add(importer, imported)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []


def between_units(root: Path) -> set[tuple[str, str]]:
    pairs = {(unit(importer), unit(imported)) for importer, imported in edges(root)}
    return {(importer, imported) for importer, imported in pairs if importer != imported}


def write(root: Path, sources: dict[str, str]) -> Path:
    for name, source in sources.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(source)
    return root


def test_every_import_is_resolved(tmp_path):
    house = write(
        tmp_path,
        {
            "lth_sparse/__init__.py": "from .nn import f",
            "lth_sparse/nn.py": "import torch\nfrom . import ops\nfrom lth_sparse import f",
            "lth_sparse/ops/__init__.py": "def f():\n    from ..kernels import pattern",
            "lth_sparse/ops/cpu.py": "from .. import nn\nimport lth_sparse.kernels.pattern as p",
            "kernels/pattern.py": "from ..ops.cpu import f",
        },
    )
    short = {(a.removeprefix("lth_sparse."), b.removeprefix("lth_sparse.")) for a, b in edges(house)}
    assert short == {
        ("lth_sparse", "nn"),
        ("nn", "ops"),
        ("nn", "lth_sparse"),
        ("ops", "kernels.pattern"),
        ("ops.cpu", "nn"),
        ("ops.cpu", "kernels.pattern"),
        ("kernels.pattern", "ops.cpu"),
    }
    assert {unit(importer) for importer, _ in upwards(house)} == {"nn", "ops", "kernels"}


def test_a_cycle_and_a_stranger_are_noticed(tmp_path):
    sources = {"lth_sparse/nn.py": "from . import optim", "lth_sparse/optim.py": "from .nn import f"}
    house = write(tmp_path, sources)
    assert upwards(house) == [] and set(cycle(edges(house))) == {"lth_sparse.nn", "lth_sparse.optim"}
    with pytest.raises(pytest.fail.Exception, match="no floor"):
        floor("lth_sparse.utils")


def test_every_module_has_a_floor():
    assert all(floor(name) in range(6) for name in modules(ROOT) if name != FACADE)


def test_imports_run_downwards_without_cycles():
    assert (FACADE, "lth_sparse.prune") in edges(ROOT)
    assert upwards(ROOT) == []
    assert cycle(edges(ROOT)) == cycle(between_units(ROOT)) == []


def test_only_ops_and_dispatch_import_the_kernels():
    importers = {importer for importer, imported in between_units(ROOT) if imported == "kernels"}
    assert importers and importers <= {"ops", "dispatch"}


def test_nothing_imports_the_folders_beside_the_package_by_their_bare_name():
    for name, path in modules(ROOT).items():
        roots = {imported.split(".")[0] for imported in imports(name, path)}
        assert roots.isdisjoint({*MAPPED, "tests"}), name


def prints(path: Path) -> bool:
    return any(isinstance(node, ast.Name) and node.id == "print" for node in ast.walk(ast.parse(read(path))))


def test_only_the_command_line_prints():
    assert {unit(name) for name, path in modules(ROOT).items() if prints(path)} <= {"cli"}


def test_files_stay_short():
    assert [name for name, path in modules(ROOT).items() if len(read(path).splitlines()) > LINES] == []


@pytest.mark.parametrize("file", ["README.md", ".ci/run"])
def test_the_two_commands_stand_in(file):
    assert {line.strip() for line in read(ROOT / file).splitlines()} >= COMMANDS


def test_unwritten_memory_is_nan():
    assert torch.empty(3).isnan().all()


BREAK = """
import sys
class Broken:
    def find_spec(name, path=None, target=None):
        if name == "torchvision":
            raise RuntimeError("operator torchvision::nms does not exist")
        if name == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Broken)
"""
IMPORT = f"""
import importlib, sys, torch
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not set({HEAVY}) & set(sys.modules), set({HEAVY}) & set(sys.modules)
assert not torch.cuda.is_initialized()
"""
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


def run(code: str, *arguments: str, cwd: Path, **environment: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("code", [IMPORT, BREAK + IMPORT], ids=["as it is", "no triton, broken torchvision"])
def test_importing_is_light(code, tmp_path):
    names = [name for name in modules(ROOT) if unit(name) not in ("kernels", "__main__")]
    run(code, *names, cwd=tmp_path, PYTHONPATH=str(ROOT))


def test_broken_libraries_break(tmp_path):
    """The blocker of the test above does block."""
    for name, error in (("torchvision", "RuntimeError"), ("triton", "ModuleNotFoundError")):
        run(f"{BREAK}\ntry:\n    import {name}\nexcept {error}:\n    sys.exit(0)\nsys.exit(1)", cwd=tmp_path)


def copy_sources(to: Path) -> Path:
    for name in ("lth_sparse", "tests", *MAPPED):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, to)
    return to


def expected_files() -> set[str]:
    package = {str(path.relative_to(ROOT)) for path in (ROOT / "lth_sparse").rglob("*.py")}
    code = [path for folder in ("kernels", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    data = [path for kind in ("*.toml", "*.json", "tutorials/*.*") for path in (ROOT / "experiments").glob(kind)]
    return package | {f"{FACADE}/{path.relative_to(ROOT)}" for path in [*code, *data]}


def test_the_wheel_holds_the_whole_package_and_nothing_beside_it(tmp_path):
    source, out = copy_sources(tmp_path), tmp_path / "out"
    out.mkdir()
    run(BUILD, str(out), cwd=source)
    (wheel,) = out.glob("*.whl")
    with ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert {"lth_sparse/kernels/pattern.py", "lth_sparse/experiments/paper_claims.json"} <= names
    assert any(Path(name).match("lth_sparse/experiments/*.toml") for name in names)
    assert expected_files() - names == set()
    version = wheel.name.split("-")[1]
    assert {name.split("/")[0] for name in names} == {"lth_sparse", f"lth_sparse-{version}.dist-info"}
    assert f'__version__ = "{version}"' in read(ROOT / "lth_sparse/__init__.py")


def test_the_folders_beside_the_package_are_no_packages():
    """An `__init__.py` in kernels/ would shadow Hugging Face's `kernels` for whoever starts Python here."""
    assert [str(path) for name in (*MAPPED, "tests") for path in (ROOT / name).rglob("__init__.py")] == []
