"""Sums of rows of every instruction set against double arithmetic; AVX-512 runs over emulated registers too."""

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
def test_sums_of_rows(level: str, emulated: bool, tmp_path: Path) -> None:
    program = tmp_path / "check"
    command = ["g++", "-O1", "-std=c++20", "-fno-math-errno", f"-I{ROOT / 'csrc'}", f"-DKERNELS=rows_{level}"]
    command += ["-DPLANMILL_EMULATE"] * emulated
    sources = [Path(__file__).with_name("rows_check.cpp"), ROOT / "csrc" / "routing" / f"rows_{level}.cpp"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout == "0 failures\n"
