"""Inputs of matrix_root that tests, benchmarks and plan checks share, and how its output is compared."""

from typing import Any

import torch

from planmill.kernels.common.inputs import strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def spd(g: torch.Generator, dtype: torch.dtype, batch: int, d: int, *, rows: int = 0, spread: float = 0.0) -> Any:
    """Covariances of `rows` rows (2 d if 0) whose channels' deviations go from 1 down to 10^-spread."""
    x = torch.randn(batch, rows or 2 * d, d, generator=g, dtype=torch.float64) * torch.logspace(0, -spread, d)
    return (x.mT @ x / x.shape[1]).to(dtype)


def compare(_args: tuple, got: tuple, want: tuple, _atol: float, rtol: float) -> None:
    """Each matrix against its own largest entry; symmetric to the bit."""
    for g, w in zip(got[0].double(), want[0].double(), strict=True):
        assert torch.equal(g.isnan(), w.isnan()), "NaN in other places"
        assert torch.equal(g.nan_to_num(), g.mT.nan_to_num()), "not symmetric"
        if bool(w.isfinite().all()) and w.numel() > 0:
            error, bound = float((g - w).abs().max()), rtol * float(w.abs().max())
            assert error <= bound, f"off by {error:.3g}, bound {bound:.3g}"


def _asymmetric(dtype: torch.dtype, g: torch.Generator) -> tuple:
    return spd(g, dtype, 2, 21) + 0.1 * torch.rand(21, 21, generator=g).to(dtype), 4, False


def _zero(dtype: torch.dtype, g: torch.Generator) -> tuple:
    s = spd(g, dtype, 3, 6)
    s[1] = 0
    return s, 4, False


def _poisoned(dtype: torch.dtype, g: torch.Generator) -> tuple:
    s = spd(g, dtype, 4, 19)
    s[1, 3, 17], s[2, 5, 5], s[3] = torch.nan, torch.inf, -s[3]
    return s, 5, True


def cases() -> list[Case]:
    def case(
        id: str, batch: int, d: int, iterations: int = 5, inverse: bool = False, *,
        dtypes: Any = FLOAT32, gradient: bool = False, compiled: bool = False, factor: float = 1.0, **options: Any,
    ) -> Case:  # fmt: skip
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            return spd(g, dtype, batch, d, **options) * factor, iterations, inverse

        return Case(id, make, dtypes, gradient=gradient, compiled=compiled)

    every = (torch.float32, torch.bfloat16, torch.float16)
    return [
        case("small", 2, 5, 3, gradient=True, compiled=True),
        case("small_inverse", 2, 5, 3, True, dtypes=every, gradient=True),
        case("one", 1, 1),
        case("one_step", 2, 9, 1),
        case("one_step_inverse", 2, 9, 1, True),
        case("two_steps", 2, 17, 2),
        case("two_steps_inverse", 3, 17, 2, True),
        case("past_a_panel", 3, 33, 5, dtypes=every),
        case("past_a_tile", 1, 65, 5, True),
        case("wide", 1, 130, 5),
        case("converged", 2, 24, 14),
        case("converged_inverse", 2, 24, 14, True),
        case("singular", 2, 40, 5, rows=13),
        case("singular_inverse", 2, 40, 5, True, rows=13),
        case("spread", 2, 40, 8, spread=3.0),
        case("spread_inverse", 2, 40, 8, True, spread=3.0),
        case("huge", 2, 20, 5, factor=1e37),
        case("tiny_inverse", 2, 20, 5, True, factor=1e-38),
        case("no_matrices", 0, 5),
        case("no_width", 3, 0),
        Case("strided", lambda t, g: (strided(spd(g, t, 2, 21)), 5, True)),
        Case("asymmetric", _asymmetric, FLOAT32, gradient=True),
        Case("zero", _zero, FLOAT32),
        Case("poisoned", _poisoned, FLOAT32),
    ]
