"""covariance against torch.cov. Error: largest error of an entry by the standard deviations of its two channels."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.moments import Moments, covariance_moments, shrink_ledoit_wolf, shrink_oas

from ..cases import Case, Draw, Goal, Peer

ROWS, WIDTH = 50000, 768


def normal(rows: int, width: int, mean: float) -> Callable[[Draw], tuple]:
    """Independent channels of deviation 1."""
    return lambda draw: ((draw.normal(rows, width).float() + mean).to(draw.dtype),)


def correlation_error(args: tuple, covariance: torch.Tensor) -> float:
    """Of 64 random channels, against float64."""
    (x,) = args
    chosen = torch.randperm(x.shape[1])[:64].to(x.device)
    truth = torch.cov(x[:, chosen].double().T)
    deviation = truth.diagonal().sqrt()
    got = covariance[chosen][:, chosen].double()
    return float(((got - truth) / (deviation[:, None] * deviation)).abs().max())


def with_torch(x: torch.Tensor) -> Callable[[], Any]:
    """torch.cov, as a user calls it."""
    return lambda: torch.cov(x.T)


def with_numpy(x: torch.Tensor) -> Callable[[], Any]:
    """numpy.cov of the float32 values."""
    import numpy as np

    rows = x.float().numpy()
    return lambda: torch.from_numpy(np.cov(rows, rowvar=False, dtype=np.float32))


def ledoit_wolf(x: torch.Tensor) -> torch.Tensor:
    """Streamed moments, then the shrunk covariance."""
    return shrink_ledoit_wolf(Moments(x.shape[1]).update(x)).covariance


def oas(x: torch.Tensor) -> torch.Tensor:
    """Streamed moments, then the shrunk covariance."""
    return shrink_oas(Moments(x.shape[1]).update(x)).covariance


def with_sklearn(estimator: str) -> Callable[[torch.Tensor], Callable[[], Any]]:
    """scikit-learn's `estimator` on float32 rows."""

    def prepare(x: torch.Tensor) -> Callable[[], Any]:
        import sklearn.covariance

        rows = x.float().numpy()
        return lambda: torch.from_numpy(getattr(sklearn.covariance, estimator)().fit(rows).covariance_)

    return prepare


def ledoit_wolf_share(rows: torch.Tensor, s: torch.Tensor) -> float:
    """Of centred rows and their covariance of divisor N."""
    n, d = rows.shape
    m, squares = s.trace() / d, s.square().sum()
    delta = (squares - d * m * m) / d
    beta = torch.minimum(((rows.square().sum(1) ** 2).mean() - squares) / (n * d), delta)
    return float(beta / delta)


def oas_share(rows: torch.Tensor, s: torch.Tensor) -> float:
    """Of centred rows and their covariance of divisor N."""
    n, d = rows.shape
    m, a = s.trace() / d, s.square().mean()
    return min(1.0, float((a + m * m) / ((n + 1) * (a - m * m / d))))


def shrunk_error(share: Callable[[torch.Tensor, torch.Tensor], float]) -> Callable[[tuple, torch.Tensor], float]:
    """Against the same estimate from float64 rows, by its largest entry."""

    def check(args: tuple, covariance: torch.Tensor) -> float:
        (x,) = args
        rows = x.double() - x.double().mean(0)
        s = rows.T @ rows / len(rows)
        rho, d = share(rows, s), s.shape[0]
        truth = (1 - rho) * s + rho * s.trace() / d * torch.eye(d, dtype=s.dtype, device=s.device)
        return float((covariance.double() - truth).abs().max() / truth.abs().max())

    return check


FORMULA = Peer(
    with_torch, tolerance=1e-2
)  # bfloat16 results are rounded to it; a mean of 1000 costs torch.cov accuracy
CASES = [
    *(
        Case(
            op="covariance",
            id=f"N{ROWS}-d{WIDTH}-mean{mean}",
            make=normal(ROWS, WIDTH, mean),
            small=normal(300, 64, mean),
            ours=lambda x: covariance_moments(x).covariance,
            peers={
                "torch.cov": FORMULA,
                "numpy.cov": Peer(with_numpy, tolerance=1e-2, devices=("cpu",)),
                "scikit-learn EmpiricalCovariance": Peer(
                    with_sklearn("EmpiricalCovariance"), package="sklearn", tolerance=1e-2, devices=("cpu",)
                ),
            },
            check=correlation_error,
            tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6},
            flops=lambda x: x.shape[0] * x.shape[1] * (x.shape[1] + 1),
            dtypes=dtypes,
            goals=(Goal("ratio", 2.5, "torch.cov"), Goal("gemm", 0.7, device="cuda")),
            memory=True,
        )
        for mean, dtypes in ((0, (torch.float32, torch.bfloat16)), (1000, (torch.float32,)))
    ),
    *(
        Case(
            op="covariance",
            id=f"{name}-N10000-d768",
            make=normal(10000, WIDTH, 1.0),
            small=normal(300, 64, 1.0),
            ours=ours,
            peers={f"scikit-learn {peer}": Peer(with_sklearn(peer), package="sklearn", devices=("cpu",))},
            check=shrunk_error(share),
            tolerance={torch.float32: 1e-6},
            flops=lambda x: x.shape[0] * x.shape[1] * (x.shape[1] + 1),
            goals=goals,
        )
        for name, ours, peer, share, goals in (
            ("ledoit-wolf", ledoit_wolf, "LedoitWolf", ledoit_wolf_share, (Goal("ratio", 5), Goal("error", 1e-6))),
            ("oas", oas, "OAS", oas_share, ()),
        )
    ),
]
