"""Compile every kernel for sm_80 and sm_90 without a GPU, read the machine code, and refuse what would be slow.

    python benchmarks/compiled.py [NAME ...] [--write benchmarks/results/compiled.md]

A case calls a launcher on tensors without memory while launches are recorded instead of run, so what is compiled is
what would run: its types, constants and divisibilities. Fails on register spills, on a matrix kernel without
tensor-core instructions, and where operands are not moved 16 bytes at a time. Works with any Triton from 3.6 on; the
wheels bring the assembler and the disassembler.
"""

import argparse
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from lth_sparse.benchmarks.compiled_cases import Case, cases
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int16: "*i16",
    torch.uint16: "*u16",
    torch.uint8: "*u8",
    torch.bool: "*i1",
}


class Launch(NamedTuple):
    """What a launcher handed to Triton: the kernel, its arguments by name, and its options."""

    kernel: JITFunction
    arguments: dict[str, object]
    options: dict[str, object]


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Inside, kernels are not run; the list fills with their launches."""
    launches: list[Launch] = []
    run = JITFunction.run

    def record(kernel, *args, grid, warmup, **kwargs):
        arguments = dict(zip(kernel.arg_names, args, strict=False))
        options = {name: value for name, value in kwargs.items() if name not in kernel.arg_names}
        launches.append(Launch(kernel, arguments | {n: v for n, v in kwargs.items() if n not in options}, options))

    JITFunction.run = record
    try:
        yield launches
    finally:
        JITFunction.run = run


def source(launch: Launch) -> ASTSource:
    """The kernel specialised as Triton does: 1 and None become constants, multiples of 16 are told to the compiler."""
    constexprs = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
    constants, kinds, divisible = {}, {}, []
    for name in launch.kernel.arg_names:
        value = launch.arguments[name]
        if name in constexprs or value is None or (type(value) is int and value == 1):
            constants[name], kinds[name] = value, "constexpr"
        elif isinstance(value, torch.Tensor):
            kinds[name] = POINTER[value.dtype]
            divisible.append(name)
        elif isinstance(value, float):
            kinds[name] = "fp32"
        else:
            kinds[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 else []
    place = {name: (at,) for at, name in enumerate(launch.kernel.arg_names)}
    attributes = {place[name]: [["tt.divisibility", 16]] for name in divisible}
    return ASTSource(launch.kernel, kinds, {place[name]: value for name, value in constants.items()}, attributes)


def compile_case(case: Case, capability: int) -> dict:
    """Registers, stack and shared memory in bytes, instructions, and elements per thread on one architecture."""
    with recorded() as launches:
        case.launch()
    launch = next(launch for launch in launches if launch.kernel.__name__ == case.kernel)
    options = {"num_warps": 4, "num_stages": 3} | launch.options
    compiled = triton.compile(source(launch), target=GPUTarget("cuda", capability, 32), options=options)
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
        "elements": math.prod(launch.arguments[name] for name in case.tile) / (32 * options["num_warps"]),
    }


def defects(case: Case, found: dict, capability: int) -> list[str]:
    """What is wrong with the machine code, in words; nothing if it is as it should be."""
    opcodes, wrong = found["opcodes"], []
    if found["stack"] or count(opcodes, "LDL") or count(opcodes, "STL"):
        wrong.append(f"spills {found['stack']} bytes")
    wanted = "HGMMA" if capability == 90 else "HMMA"
    if case.matrix and not count(opcodes, wanted):
        wrong.append(f"no {wanted}, the tensor-core instruction")
    moves = sorted(opcode for opcode in opcodes if f"{opcode}.".startswith(f"{case.wide}."))
    if case.wide and (not moves or not all("128" in opcode.split(".") for opcode in moves)):
        wrong.append(f"{case.wide} is not 16 bytes wide but {', '.join(moves) or 'absent'}")
    return wrong


def count(opcodes: Counter, start: str) -> int:
    """Instructions whose opcode, up to one of its dots, is `start`."""
    return sum(n for opcode, n in opcodes.items() if f"{opcode}.".startswith(f"{start}."))


def table(names: list[str]) -> tuple[str, list[str]]:
    """A Markdown table of the cases whose name contains one of `names` (all, if none), and the defects."""
    head = ["kernel", "arch", "registers", "shared bytes", "instructions per element", "matrix", "16-byte moves"]
    lines, wrong = [_row(head), _row(["---"] * len(head))], []
    for case in (case for case in cases() if not names or any(name in case.name for name in names)):
        for capability in (80, 90):
            found = compile_case(case, capability)
            opcodes = found["opcodes"]
            matrix = next((f"{n} {op}" for op in ("HGMMA", "HMMA", "FFMA") if (n := count(opcodes, op))), "-")
            per_element = f"{sum(opcodes.values()) / found['elements']:.1f}"
            cells = [case.name, f"sm_{capability}", found["registers"], found["shared"], per_element, matrix]
            lines.append(_row([*cells, f"{count(opcodes, case.wide)} {case.wide}" if case.wide else "-"]))
            wrong += [f"{case.name} on sm_{capability}: {defect}" for defect in defects(case, found, capability)]
    return "\n".join(lines), wrong


def _row(cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def _tool(name, *arguments):
    return subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, check=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only cases whose name contains one of these")
    parser.add_argument("--write", type=Path, metavar="FILE", help="append the table to this file")
    options = parser.parse_args()
    text, wrong = table(options.names)
    sys.stdout.write(f"Triton {triton.__version__}\n\n{text}\n")
    for defect in wrong:
        sys.stderr.write(f"{defect}\n")
    if options.write and not wrong:
        with options.write.open("a", encoding="utf-8") as file:
            file.write(f"\n## Triton {triton.__version__}\n\n{text}\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
