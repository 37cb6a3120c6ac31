"""Every kernel compiles for both architectures without a GPU to machine code that should be fast."""

import importlib.util
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "compiled.py"


@pytest.fixture(scope="module")
def compiled():
    pytest.importorskip("triton")
    spec = importlib.util.spec_from_file_location("compiled", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_passes_its_gates():
    pytest.importorskip("triton")
    plain = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env=plain)
    assert result.returncode == 0, result.stderr
    assert all(f"sm_{capability}" in result.stdout for capability in (80, 90))


@pytest.mark.parametrize(
    "capability, opcodes, stack, defects",
    [
        (90, {"HGMMA.64x64x16.F32.BF16": 4, "LDGSTS.E.BYPASS.128": 12}, 0, []),
        (80, {"HMMA.16816.F32.BF16": 4, "LDGSTS.E.BYPASS.128": 12}, 0, []),
        (90, {"HGMMA.64x64x16.F32.BF16": 4, "LDGSTS.E.BYPASS.128": 12, "LDL.64": 3}, 16, ["spills 16 bytes"]),
        (80, {"FFMA": 4, "LDGSTS.E.BYPASS.128": 12}, 0, ["no HMMA, the tensor-core instruction"]),
        (90, {"HMMA.16816.F32.BF16": 4, "LDGSTS.E.BYPASS.128": 12}, 0, ["no HGMMA, the tensor-core instruction"]),
        (80, {"HMMA.16816.F32.BF16": 4, "LDGSTS.E": 48}, 0, ["LDGSTS is not 16 bytes wide but LDGSTS.E"]),
        (80, {"HMMA.16816.F32.BF16": 4}, 0, ["LDGSTS is not 16 bytes wide but absent"]),
    ],
)
def test_slow_code_is_named(compiled, capability, opcodes, stack, defects):
    case = compiled.Case("a kernel", None, "", (), matrix=True)
    assert compiled.defects(case, {"stack": stack, "opcodes": Counter(opcodes)}, capability) == defects
