"""Inputs of coreset that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def absent() -> torch.Tensor:
    """No distances to rows chosen before."""
    return torch.empty(0)


def _duplicates(dtype: torch.dtype, g: torch.Generator) -> tuple:
    rows = unit(g, dtype, 12, 24)
    return torch.cat([rows, rows, rows]), absent(), 20, 14


def _poisoned(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x = poison_row(poison_row(poison_row(unit(g, dtype, 20, 24), 3), 0, torch.inf), 19)
    return x, absent(), 20, -1


def _continued(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, before = unit(g, dtype, 70, 33), unit(g, dtype, 9, 33)
    distances = torch.cdist(x.float(), before.float()).amin(1)
    distances[5], distances[6] = torch.inf, torch.nan
    return x, distances, 12, -1


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: (normal(g, t, 11, 8), absent(), 5, 3), compiled=True),
        Case("one", lambda t, g: (normal(g, t, 1, 1), absent(), 1, 0)),
        Case("all_rows", lambda t, g: (normal(g, t, 40, 5), absent(), 40, 7)),
        Case("across_tiles", lambda t, g: (unit(g, t, 1025, 65), absent(), 12, 1024)),
        Case("wide", lambda t, g: (unit(g, t, 33, 577), absent(), 6, 32)),
        Case("ties", lambda t, g: (integers(g, t, 90, 4), absent(), 90, 2)),
        Case("duplicates", _duplicates),
        Case("strided", lambda t, g: (strided(unit(g, t, 90, 40)), absent(), 9, 0)),
        Case("large_mean", lambda t, g: (normal(g, t, 90, 40, mean=1000.0), absent(), 9, 1)),
        Case("huge", lambda t, g: (normal(g, t, 90, 24, scale=1e37), absent(), 9, 4), FLOAT32),
        Case("tiny", lambda t, g: (normal(g, t, 90, 24, scale=1e-37), absent(), 9, 4), FLOAT32),
        Case("nan", _poisoned),
        Case("nan_start", lambda t, g: (poison_row(unit(g, t, 20, 24), 3), absent(), 4, 3)),
        Case("continued", _continued),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Each row was the farthest when it was chosen, as far as rounding tells, and the first of those equally far."""
    features, distances, count, start = args
    (chosen,) = got
    assert chosen.dtype == torch.int32
    assert chosen.shape == want[0].shape == (count,)
    assert len(set(chosen.tolist())) == count, "a row was chosen twice"
    f = features.double()
    nearest = distances.double().square() if len(distances) else f.new_full((len(f),), torch.inf)
    nearest = torch.where(f.isfinite().all(1) & ~nearest.isnan(), nearest, -1.0)
    for step, row in enumerate(chosen.tolist()):
        if step == 0 and start >= 0:
            assert row == start
        else:
            farthest = float(nearest.max())
            reached = float(nearest[row])
            assert reached == farthest or reached >= farthest * (1 - 2 * rtol) > 0, f"step {step}: row {row} is nearer"
            if reached == farthest:
                assert row == int(nearest.argmax()), f"step {step}: row {row} is not the first of equals"
        squared = (f - f[row]).square().sum(1)
        nearest = torch.where(squared < nearest, squared, nearest)
        nearest[row] = -torch.inf
