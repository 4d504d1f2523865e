"""The bounds of sparse_encoding on each instruction set against double arithmetic; AVX-512 also over plain C++.

AMX machines take the AVX-512 kernels with products in float, which are checked too.
"""

import subprocess
from pathlib import Path

import pytest

from planmill import kernels

ROOT = Path(__file__).parents[3]
NATIVE = [level for level in ("baseline", "avx2", "avx512") if level in kernels.cpu_capabilities()]


@pytest.mark.parametrize(
    ("level", "emulated"),
    [*((level, False) for level in NATIVE), ("avx512", True)],
    ids=lambda v: v if isinstance(v, str) else "emulated" if v else "native",
)
def test_bounds_hold_and_nothing_active_is_missed(level: str, emulated: bool, tmp_path: Path) -> None:
    program = tmp_path / "check"
    command = ["g++", "-O2", "-std=c++20", "-fno-math-errno", f"-I{ROOT / 'csrc'}", f"-DKERNELS=encoding_{level}"]
    command += ["-DPLANMILL_EMULATE"] * emulated
    sources = [Path(__file__).with_name("encoding_check.cpp"), ROOT / "csrc" / "routing" / f"encoding_{level}.cpp"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 failures" in result.stdout
