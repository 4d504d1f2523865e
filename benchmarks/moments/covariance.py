"""covariance against torch.cov. Error: largest error of an entry by the standard deviations of its two channels."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.moments import Moments, covariance_moments, shrink_ledoit_wolf

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


def with_sklearn(x: torch.Tensor) -> Callable[[], Any]:
    """scikit-learn's LedoitWolf on float32 rows."""
    from sklearn.covariance import LedoitWolf

    rows = x.float().numpy()
    return lambda: torch.from_numpy(LedoitWolf().fit(rows).covariance_)


def shrunk_error(args: tuple, covariance: torch.Tensor) -> float:
    """Against the same estimate from float64 rows, by its largest entry."""
    (x,) = args
    rows = x.double() - x.double().mean(0)
    n, d = rows.shape
    s = rows.T @ rows / n
    m, squares = s.trace() / d, s.square().sum()
    delta = (squares - d * m * m) / d
    beta = torch.minimum(((rows.square().sum(1) ** 2).mean() - squares) / (n * d), delta)
    truth = (1 - beta / delta) * s + beta / delta * m * torch.eye(d, dtype=s.dtype, device=s.device)
    return float((covariance.double() - truth).abs().max() / truth.abs().max())


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
            peers={"torch.cov": FORMULA, "numpy.cov": Peer(with_numpy, tolerance=1e-2, devices=("cpu",))},
            check=correlation_error,
            tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-6},
            flops=lambda x: x.shape[0] * x.shape[1] * (x.shape[1] + 1),
            dtypes=dtypes,
            goals=(Goal("ratio", 2.5, "torch.cov"), Goal("gemm", 0.7, device="cuda")),
            memory=True,
        )
        for mean, dtypes in ((0, (torch.float32, torch.bfloat16)), (1000, (torch.float32,)))
    ),
    Case(
        op="covariance",
        id="ledoit-wolf-N10000-d768",
        make=normal(10000, WIDTH, 1.0),
        small=normal(300, 64, 1.0),
        ours=ledoit_wolf,
        peers={"scikit-learn LedoitWolf": Peer(with_sklearn, package="sklearn", devices=("cpu",))},
        check=shrunk_error,
        tolerance={torch.float32: 1e-6},
        flops=lambda x: x.shape[0] * x.shape[1] * (x.shape[1] + 1),
        goals=(Goal("ratio", 5), Goal("error", 1e-6)),
    ),
]
