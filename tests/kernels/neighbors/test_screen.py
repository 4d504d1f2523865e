"""The screen of every instruction set against double arithmetic; those a machine lacks run over emulated registers."""

import pytest

from planmill import kernels

from ..conftest import Check

WITHOUT_TILES = ("baseline", "avx2", "avx512")
LEVELS = (*WITHOUT_TILES, "amx", "bytes_avx2", "bytes_avx512", *(f"floats_{level}" for level in WITHOUT_TILES))
NATIVE = [level for level in LEVELS if level.rpartition("_")[2] in kernels.cpu_capabilities()]
EMULATED = ["avx512", "amx", "bytes_avx512", "floats_avx512"]


@pytest.mark.parametrize(
    ("level", "emulated"),
    [*((level, False) for level in NATIVE), *((level, True) for level in EMULATED)],
    ids=lambda v: v if isinstance(v, str) else "emulated" if v else "native",
)
def test_bounds_hold_and_no_best_row_is_missed(level: str, emulated: bool, check_kernels: Check) -> None:
    source = f"neighbors/screen_{level.rpartition('_')[2]}"
    check_kernels(source, "-O2", emulated=emulated, kernels=f"screen_{level}")
