"""The screen of every instruction set against double arithmetic; those a machine lacks run over emulated registers."""

import subprocess
from pathlib import Path

import pytest

from planmill import kernels

ROOT = Path(__file__).parents[3]
WITHOUT_TILES = ("baseline", "avx2", "avx512")
LEVELS = (*WITHOUT_TILES, "amx", "bytes_avx2", "bytes_avx512", *(f"floats_{level}" for level in WITHOUT_TILES))
NATIVE = [level for level in LEVELS if level.rpartition("_")[2] in kernels.cpu_capabilities()]
EMULATED = ["avx512", "amx", "bytes_avx512", "floats_avx512"]


@pytest.mark.parametrize(
    ("level", "emulated"),
    [*((level, False) for level in NATIVE), *((level, True) for level in EMULATED)],
    ids=lambda v: v if isinstance(v, str) else "emulated" if v else "native",
)
def test_bounds_hold_and_no_best_row_is_missed(level: str, emulated: bool, tmp_path: Path) -> None:
    program = tmp_path / "check"
    command = ["g++", "-O2", "-std=c++20", "-fno-math-errno", f"-I{ROOT / 'csrc'}", f"-DKERNELS=screen_{level}"]
    command += ["-DPLANMILL_EMULATE"] * emulated
    source = ROOT / "csrc" / "neighbors" / f"screen_{level.rpartition('_')[2]}.cpp"
    sources = [Path(__file__).with_name("screen_check.cpp"), source]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
    assert "0 failures" in result.stdout
