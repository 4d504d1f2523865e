"""Inputs of covariance that tests, benchmarks and plan checks share, and how its outputs are compared."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case


def compare(args: tuple, got: tuple, want: tuple, _atol: float, rtol: float) -> None:
    """Each moment against the size of what it sums: its terms' absolute values, not their sum, which may cancel."""
    x = args[0].double()
    z = x - x.sum(1, keepdim=True) / max(x.shape[1], 1)
    square = (z * z).sum(2)
    spread = (z * z).sum(1).sqrt()  # [B, d]
    scales = (
        x.abs().sum(1) / max(x.shape[1], 1),
        spread[:, :, None] * spread[:, None, :],
        (square[:, :, None] * z.abs()).sum(1),
        (square * square).sum(1),
    )
    got, want = ((m[0].double() + m[1].double(), *m[2:]) for m in (got, want))
    for name, g, w, scale in zip(("mean", "scatter", "third", "fourth"), got, want, scales, strict=True):
        assert torch.equal(g.isfinite(), w.isfinite()), f"{name}: finite in other places"
        fine = w.isfinite()
        error = (g.double() - w.double()).abs()[fine]
        bound = rtol * scale[fine]
        assert bool((error <= bound).all()), f"{name}: off by {error.max():.3g}, largest bound {bound.max():.3g}"


def cases() -> list[Case]:
    f32 = (torch.float32,)
    return [
        Case("small", lambda t, g: (normal(g, t, 2, 7, 5),), gradient=True, compiled=True),
        Case("one_row", lambda t, g: (normal(g, t, 1, 1, 3),)),
        Case("no_rows", lambda t, g: (normal(g, t, 2, 0, 3),)),
        Case("no_sets", lambda t, g: (normal(g, t, 0, 4, 3),)),
        Case("one_column", lambda t, g: (normal(g, t, 1, 300, 1),)),
        Case("across_a_panel", lambda t, g: (normal(g, t, 1, 129, 25),), gradient=True),
        Case("many_rows", lambda t, g: (normal(g, t, 1, 1500, 49),)),
        Case("wide", lambda t, g: (normal(g, t, 1, 40, 200),)),
        Case("sets", lambda t, g: (normal(g, t, 5, 196, 33),)),
        Case("strided", lambda t, g: (strided(normal(g, t, 2, 150, 31)),)),
        Case("ties", lambda t, g: (integers(g, t, 2, 200, 20),)),
        Case("constant", lambda t, g: (torch.full((1, 300, 9), 3.0, dtype=t),)),
        Case("far_from_origin", lambda t, g: (normal(g, t, 1, 700, 30, mean=1000.0),), dtypes=f32),
        Case("drifting", lambda t, g: (normal(g, t, 1, 900, 30) + torch.linspace(0, 50, 900)[:, None],), dtypes=f32),
        Case("tiny", lambda t, g: (normal(g, t, 1, 200, 20, scale=1e-8),), dtypes=f32),
        Case("huge", lambda t, g: (normal(g, t, 1, 200, 20, scale=1e8),), dtypes=f32),
        Case("nan", lambda t, g: (poison_row(normal(g, t, 2, 200, 20), 250),)),
    ]
