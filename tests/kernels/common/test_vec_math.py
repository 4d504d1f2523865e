"""Vector code that kernels share, exp and the activations and small products, against double arithmetic."""

import subprocess
from pathlib import Path

import pytest

from planmill import kernels

ROOT = Path(__file__).parents[3]
NATIVE = {"baseline": "SSE2", "avx2": "AVX2", "avx512": "AVX512"}


@pytest.mark.parametrize("check", ["vec_math_check", "products_check"])
@pytest.mark.parametrize("vector", [v for level, v in NATIVE.items() if level in kernels.cpu_capabilities()] + ["none"])
def test_functions_are_within_their_bounds(check: str, vector: str, tmp_path: Path) -> None:
    """Plain C++ ("none") is the stand-in for AVX-512 where that is absent."""
    program, source = tmp_path / "check", Path(__file__).with_name(f"{check}.cpp")
    command = ["g++", "-O1", "-std=c++20", "-fno-math-errno", f"-I{ROOT / 'csrc'}", f"-DPLANMILL_{vector.upper()}"]
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert result.stdout.endswith("0 failures\n")
