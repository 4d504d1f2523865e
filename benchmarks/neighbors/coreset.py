"""coreset against the loop over all rows. Error: how much nearer a chosen row was than the farthest, relative.

The published loop takes minutes for 5000 rows of 50000: its steps all cost the same, so STEPS of them are timed, and
their time is multiplied. Ours is timed whole. Both report their time themselves, and carry the rows for the check.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import choose_coreset

from ..cases import Case, Draw, Goal, Peer

STEPS = 100  # of a loop, timed
EVERY_ROW, SOME_STEPS, SOME_ROWS = 16, 4, 256  # first steps checked against all rows, later ones against some


class Timed(float):
    """Milliseconds, with the rows chosen meanwhile."""

    chosen: torch.Tensor

    @classmethod
    def of(cls, call: Callable[[], torch.Tensor], factor: float = 1.0) -> "Timed":
        """The time of one call, times `factor`."""
        _wait()
        start = time.perf_counter()
        chosen = call()
        _wait()
        timed = cls((time.perf_counter() - start) * 1e3 * factor)
        timed.chosen = chosen
        return timed


def _wait() -> None:
    """For what a GPU was given before."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def gaussian(rows: int, width: int) -> Callable[[Draw], tuple]:
    """Gaussian values: all rows nearly equally far from each other."""
    return lambda draw: (draw.normal(rows, width), rows // 10)


def clustered(rows: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres, as patch features are."""
    return lambda draw: (draw.clusters(rows, width, centers=draw.centers(64, width)), rows // 10)


def ours(features: torch.Tensor, count: int) -> Timed:
    """The whole choice."""
    return Timed.of(lambda: choose_coreset(features, count, start=0))


def steps(distances: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Callable[[], Any]]:
    """The published loop with these distances of all rows from one."""

    def prepare(features: torch.Tensor, count: int) -> Callable[[], Timed]:
        some = min(STEPS, count)

        def choose() -> torch.Tensor:
            nearest = features.new_full((len(features),), torch.inf)
            chosen = torch.zeros(some, dtype=torch.int64, device=features.device)
            for step in range(1, some):
                torch.minimum(nearest, distances(features, features[chosen[step - 1]]), out=nearest)
                nearest[chosen[step - 1]] = 0
                chosen[step] = nearest.argmax()
            return chosen

        return lambda: Timed.of(choose, count / some)

    return prepare


def by_product(features: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    """Squares by one matrix-vector product: what a careful user writes; the rows' squares are those of unit rows."""
    return (2 - 2 * features @ row).clamp_min_(0).sqrt_()


def check(args: tuple, result: Timed) -> float:
    """In float64: the first steps against all rows, some later ones against some rows."""
    features, count = args
    chosen = torch.as_tensor(result.chosen, device=features.device).long()
    if len(chosen) not in (count, min(STEPS, count)) or len(chosen.unique()) != len(chosen):
        return torch.nan
    nearest = torch.full((len(features),), torch.inf, dtype=torch.float64, device=features.device)
    error = 0.0
    for step in range(min(EVERY_ROW, len(chosen) - 1)):
        nearest = torch.minimum(nearest, (features - features[chosen[step]]).double().square().sum(1))
        farthest = nearest.max().sqrt()
        error = max(error, float((farthest - nearest[chosen[step + 1]].sqrt()) / farthest))
    for step in torch.randint(1, len(chosen), (SOME_STEPS,)).tolist():
        rows = torch.cat([chosen[step : step + 1], torch.randperm(len(features))[:SOME_ROWS].to(features.device)])
        away = torch.cdist(features[rows].double(), features[chosen[:step]].double()).amin(1)
        error = max(error, float((away.max() - away[0]) / away.max()))
    return error


NORM = "PyTorch, differences and norms"
PRODUCT = "PyTorch, one product a step"
NORMS = Peer(steps(lambda f, row: torch.linalg.vector_norm(f - row, dim=1)), tolerance=1e-5)
PRODUCTS = Peer(steps(by_product), tolerance=1e-3)
ROWS, WIDTH = 50000, 512
SHARED: dict[str, Any] = {
    "op": "coreset",
    "ours": ours,
    "check": check,
    "tolerance": {torch.float32: 1e-7},
    "flops": lambda features, count: 3.0 * features.numel() * count,
    "bytes": lambda features, count: 4.0 * features.numel() * count,
    "reports_ms": True,
    "memory": True,
    "goals": (Goal("ratio", 5, NORM), Goal("error", 1e-6), Goal("memory", 0.2 * ROWS * WIDTH * 4)),
}

CASES = [
    Case(
        id=f"N{ROWS}-D{WIDTH}-10%-clustered",
        make=clustered(ROWS, WIDTH),
        small=clustered(1500, 64),
        peers={NORM: NORMS, PRODUCT: PRODUCTS},
        **SHARED,
    ),
    Case(
        id=f"N{ROWS}-D{WIDTH}-10%-gaussian",
        make=gaussian(ROWS, WIDTH),
        small=gaussian(1500, 64),
        peers={NORM: NORMS},
        **SHARED,
    ),
]
