"""Inputs of mutual_score that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
SCREENED = 2e-3  # what exact=False promises, relative to the spread: bf16 operands on AMX
ALL = (-1.0, 1)  # radius and grid width: every patch may match


def _copies(dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    image = unit(g, dtype, 1, 30, 64)
    return torch.cat([image, image, image, unit(g, dtype, 2, 30, 64)])


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: (unit(g, t, 3, 6, 8), 0.0, 0.5, *ALL, True), gradient=True, compiled=True),
        Case("two_images", lambda t, g: (unit(g, t, 2, 1, 1), 0.0, 0.3, *ALL, True)),
        Case("odd", lambda t, g: (unit(g, t, 7, 37, 65), 0.0, 0.3, *ALL, True), gradient=True),
        Case("across_tiles", lambda t, g: (unit(g, t, 3, 131, 257), 0.0, 0.9, *ALL, True)),
        Case("interval", lambda t, g: (unit(g, t, 9, 20, 16), 0.2, 0.7, *ALL, True)),
        Case("counts", lambda t, g: (unit(g, t, 9, 20, 16), 1.0, 4.0, *ALL, True)),
        Case("ties", lambda t, g: (integers(g, t, 6, 40, 6), 0.0, 0.6, *ALL, True)),
        Case("same_everywhere", lambda t, g: (torch.ones(4, 70, 16, dtype=t), 0.0, 0.5, *ALL, True)),
        Case("copies", lambda t, g: (_copies(t, g), 0.0, 0.5, *ALL, True)),
        Case("strided", lambda t, g: (strided(unit(g, t, 4, 33, 40)), 0.0, 0.5, *ALL, True)),
        Case("large_mean", lambda t, g: (normal(g, t, 5, 33, 40, mean=1000.0), 0.0, 0.5, *ALL, True)),
        Case("huge", lambda t, g: (normal(g, t, 4, 40, 24, scale=1e30), 0.0, 0.5, *ALL, True), FLOAT32),
        Case("tiny", lambda t, g: (normal(g, t, 4, 40, 24, scale=1e-30), 0.0, 0.5, *ALL, True), FLOAT32),
        Case("huge_small", lambda t, g: (normal(g, t, 2, 3, 4, scale=1e30), 0.0, 0.5, *ALL, True), FLOAT32),
        Case("tiny_small", lambda t, g: (normal(g, t, 2, 3, 4, scale=1e-30), 0.0, 0.5, *ALL, True), FLOAT32),
        Case("nan_small", lambda t, g: (poison_row(unit(g, t, 2, 3, 4), 1), 0.0, 0.5, *ALL, True)),
        Case("nan", lambda t, g: (poison_row(unit(g, t, 4, 40, 24), 53), 0.0, 0.5, *ALL, True)),
        Case("radius_zero", lambda t, g: (unit(g, t, 4, 20, 24), 0.0, 0.5, 0.0, 5, True)),
        Case("radius", lambda t, g: (unit(g, t, 5, 63, 40), 0.0, 0.5, 2.3, 9, True), gradient=True),
        Case("screened", lambda t, g: (unit(g, t, 5, 99, 128), 0.0, 0.5, *ALL, False)),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Scores close relative to the spread of the features."""
    clean = torch.cat([t.double().flatten(0, 1) for t in args if isinstance(t, torch.Tensor)])
    clean = clean[clean.isfinite().all(1)]
    spread = float((clean - clean.mean(0)).norm(dim=1).amax())
    assert got[0].dtype == torch.float32
    atol = atol if args[-1] else max(atol, SCREENED)
    torch.testing.assert_close(got[0], want[0], atol=atol * spread, rtol=rtol)
