"""Sums of rows of every instruction set against double arithmetic; AVX-512 runs over emulated registers too."""

import pytest

from planmill import kernels

from ..conftest import Check

NATIVE = [level for level in ("baseline", "avx2", "avx512") if level in kernels.cpu_capabilities()]


@pytest.mark.parametrize(
    ("level", "emulated"),
    [*((level, False) for level in NATIVE), ("avx512", True)],
    ids=lambda v: v if isinstance(v, str) else "emulated" if v else "native",
)
def test_sums_of_rows(level: str, emulated: bool, check_kernels: Check) -> None:
    check_kernels(f"routing/rows_{level}", "-O1", emulated=emulated)
