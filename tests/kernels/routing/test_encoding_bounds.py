"""The bounds of sparse_encoding on each instruction set against double arithmetic; AVX-512 also over plain C++.

AMX machines take the AVX-512 kernels with products in float, which are checked too.
"""

import pytest

from planmill import kernels

from ..conftest import Check

NATIVE = [level for level in ("baseline", "avx2", "avx512") if level in kernels.cpu_capabilities()]


@pytest.mark.parametrize(
    ("level", "emulated"),
    [*((level, False) for level in NATIVE), ("avx512", True)],
    ids=lambda v: v if isinstance(v, str) else "emulated" if v else "native",
)
def test_bounds_hold_and_nothing_active_is_missed(level: str, emulated: bool, check_kernels: Check) -> None:
    check_kernels(f"routing/encoding_{level}", "-O2", emulated=emulated)
