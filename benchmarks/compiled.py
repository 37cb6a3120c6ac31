"""Compile every kernel for sm_80 and sm_90 without a GPU, read the machine code, and refuse what would be slow.

    python benchmarks/compiled.py [--write benchmarks/results/compiled.md]

Fails on register spills, on a matrix kernel without tensor-core instructions, and where operands are not copied 16
bytes at a time. Works with any Triton from 3.6 on; the wheels bring the assembler and the disassembler.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import types
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).parents[1]
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTERS = {"words": "*i32", "offsets": "*i32", "gradient": "*fp32", "bias_gradient": "*fp32"}


class Case(NamedTuple):
    """One kernel with one choice of types and constants; `elements` of output per thread are what it computes."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict[str, object]
    divisible: tuple[str, ...]
    warps: int
    elements: float
    matrix: bool
    copies: str | None  # the width that its operands must be copied with, as SASS spells it


def cases() -> list[Case]:
    """Every kernel, with the operand types, layouts and sizes that its launcher uses."""
    package = types.ModuleType("kernels")  # by path, so that nothing of torch is needed
    package.__path__ = [str(ROOT / "kernels")]
    sys.modules.setdefault("kernels", package)
    from kernels import weight_gradient as wg

    found = []
    for dtype, precision in [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3"), ("fp32", "ieee")]:
        even = precision == "tf32"
        contiguous = ("dy_batch", "x_batch") if even else ("dy_row", "x_column")
        strides = [f"{operand}_{axis}" for operand in ("dy", "x") for axis in ("ticket", "batch", "row", "column")]
        names = [name for name in wg._weight_gradient_kernel.arg_names if name not in contiguous and not name.isupper()]
        kinds = {name: POINTERS.get(name, f"*{dtype}" if name in ("dy", "x") else "i32") for name in names}
        constants = dict.fromkeys(contiguous, 1) | {
            "HAS_BIAS": True,
            "PRECISION": precision,
            "EVEN_BATCH": even,
            "ROWS": wg.ROWS,
            "COLUMNS": wg.COLUMNS,
            "BATCH": 32 if dtype == "fp32" else 64,
        }
        divisible = [
            name for name in names if name in strides or kinds[name][0] == "*" or name in ("n_rows", "n_columns")
        ]
        divisible += ["batch"] if even else []
        tile = wg.ROWS * wg.COLUMNS / (32 * 8)
        matrix = precision != "ieee" or dtype == "bf16"
        label = f"weight_gradient {dtype} {precision}"
        found.append(
            Case(label, wg._weight_gradient_kernel, kinds, constants, tuple(divisible), 8, tile, matrix, "128")
        )
    return found


def compile_case(case: Case, capability: int) -> dict:
    """Registers, stack and shared memory in bytes, and instructions of the case on one architecture."""
    places = {name: (case.kernel.arg_names.index(name),) for name in case.kernel.arg_names}
    signature = case.types | dict.fromkeys(case.constants, "constexpr")
    source = ASTSource(
        case.kernel,
        signature,
        {places[name]: value for name, value in case.constants.items()},
        {places[name]: [["tt.divisibility", 16]] for name in case.divisible},
    )
    options = {"num_warps": case.warps, "num_stages": 3}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    opcodes = Counter(
        re.findall(r"^\s+(?:/\*[0-9a-f]+\*/)?\s*(?:@!?U?P[0-9T]+ )?([A-Z][A-Z0-9_]+[A-Z0-9_.]*)", code, re.M)
    )
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "stack": int(re.search(r"STACK:(\d+)", usage)[1]),
        "shared": compiled.metadata.shared,
        "opcodes": opcodes,
    }


def defects(case: Case, found: dict) -> list[str]:
    """What is wrong with the machine code, in words; nothing if it is as it should be."""
    opcodes, wrong = found["opcodes"], []
    if found["stack"] or count(opcodes, "LDL") or count(opcodes, "STL"):
        wrong.append(f"spills {found['stack']} bytes")
    if case.matrix and not count(opcodes, "HGMMA") and not count(opcodes, "HMMA"):
        wrong.append("no tensor-core instructions")
    copies = [op for op in opcodes if op.startswith("LDGSTS")]
    if case.copies and (not copies or not all(case.copies in op.split(".") for op in copies)):
        wrong.append(
            f"operands copied by {', '.join(sorted(copies)) or 'no asynchronous copy'}, not {case.copies} bits"
        )
    return wrong


def count(opcodes: Counter, start: str) -> int:
    """Instructions whose opcode, up to its first dot, is `start`."""
    return sum(n for opcode, n in opcodes.items() if opcode.partition(".")[0] == start)


def table() -> tuple[str, list[str]]:
    """A Markdown table of every case and architecture, and the defects."""
    head = ["kernel", "arch", "registers", "shared bytes", "instructions per element", "matrix", "16-byte copies"]
    lines, wrong = [_row(head), _row(["---"] * len(head))], []
    for case in cases():
        for capability in (80, 90):
            found = compile_case(case, capability)
            opcodes = found["opcodes"]
            matrix = next((f"{n} {name}" for name in ("HGMMA", "HMMA", "FFMA") if (n := count(opcodes, name))), "none")
            per_element = f"{sum(opcodes.values()) / case.elements:.1f}"
            cells = [case.name, f"sm_{capability}", found["registers"], found["shared"], per_element, matrix]
            lines.append(_row([*cells, count(opcodes, "LDGSTS")]))
            wrong += [f"{case.name} on sm_{capability}: {defect}" for defect in defects(case, found)]
    return "\n".join(lines), wrong


def _row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def _tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="append the table to this file")
    options = parser.parse_args()
    text, wrong = table()
    sys.stdout.write(f"Triton {triton.__version__}\n\n{text}\n")
    for defect in wrong:
        sys.stderr.write(f"{defect}\n")
    if options.write and not wrong:
        with options.write.open("a", encoding="utf-8") as file:
            file.write(f"\n## Triton {triton.__version__}\n\n{text}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
