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
    wide: str  # the instruction that must move 16 bytes at a time: LDGSTS of operands, STG of results


def cases() -> list[Case]:
    """Every kernel, with the operand types, layouts and sizes that its launcher uses."""
    package = types.ModuleType("kernels")  # by path, so that nothing of lth_sparse is imported
    package.__path__ = [str(ROOT / "kernels")]
    sys.modules.setdefault("kernels", package)
    from kernels import shadow, weight_gradient

    gradients = [("bf16", "ieee"), ("fp32", "tf32"), ("fp32", "tf32x3"), ("fp32", "ieee")]
    return [
        *(_weight_gradient(weight_gradient, *choice) for choice in gradients),
        *(_refresh(shadow, dtype) for dtype in ("fp32", "bf16")),
    ]


def _weight_gradient(module, dtype, precision):
    kernel, even = module._weight_gradient_kernel, precision == "tf32"
    contiguous = ("dy_batch", "x_batch") if even else ("dy_row", "x_column")
    names = [name for name in kernel.arg_names if name not in contiguous and not name.isupper()]
    kinds = {name: POINTERS.get(name, f"*{dtype}" if name in ("dy", "x") else "i32") for name in names}
    constants = dict.fromkeys(contiguous, 1)
    constants |= {"HAS_BIAS": True, "PRECISION": precision, "EVEN_BATCH": even}
    constants |= {"ROWS": module.ROWS, "COLUMNS": module.COLUMNS, "BATCH": 32 if dtype == "fp32" else 64}
    divisible = [name for name in names if name not in ("nnz", "n_words") and (even or name != "batch")]
    per_thread = module.ROWS * module.COLUMNS / (32 * 8)
    matrix = precision != "ieee" or dtype == "bf16"
    name = f"weight_gradient {dtype} {precision}"
    return Case(name, kernel, kinds, constants, tuple(divisible), 8, per_thread, matrix, "LDGSTS")


def _refresh(module, dtype):
    kernel = module._refresh_kernel
    names = [name for name in kernel.arg_names if not name.isupper()]
    kinds = {name: POINTERS.get(name, "i32") for name in names} | {"values": f"*{dtype}", "shadow": f"*{dtype}"}
    constants = {"ROWS": module.ROWS, "COLUMNS": module.COLUMNS}
    divisible = [name for name in names if name not in ("nnz", "n_words")]
    per_thread = module.ROWS * module.COLUMNS / (32 * 4)
    return Case(f"refresh {dtype}", kernel, kinds, constants, tuple(divisible), 4, per_thread, False, "STG")


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
    moves = sorted(opcode for opcode in opcodes if opcode.partition(".")[0] == case.wide)
    if not moves or not all("128" in opcode.split(".") for opcode in moves):
        wrong.append(f"{case.wide} is not 16 bytes wide but {', '.join(moves) or 'absent'}")
    return wrong


def count(opcodes: Counter, start: str) -> int:
    """Instructions whose opcode, up to its first dot, is `start`."""
    return sum(n for opcode, n in opcodes.items() if opcode.partition(".")[0] == start)


def table() -> tuple[str, list[str]]:
    """A Markdown table of every case and architecture, and the defects."""
    head = ["kernel", "arch", "registers", "shared bytes", "instructions per element", "matrix", "16-byte moves"]
    lines, wrong = [_row(head), _row(["---"] * len(head))], []
    for case in cases():
        for capability in (80, 90):
            found = compile_case(case, capability)
            opcodes = found["opcodes"]
            matrix = next((f"{n} {op}" for op in ("HGMMA", "HMMA", "FFMA") if (n := count(opcodes, op))), "-")
            per_element = f"{sum(opcodes.values()) / case.elements:.1f}"
            cells = [case.name, f"sm_{capability}", found["registers"], found["shared"], per_element, matrix]
            lines.append(_row([*cells, f"{count(opcodes, case.wide)} {case.wide}"]))
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
