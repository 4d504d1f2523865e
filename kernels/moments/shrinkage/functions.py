"""Shrinkage: Ledoit-Wolf, OAS and the empirical-Bayes ridge, all from `Moments`: no second pass over the data."""

from typing import NamedTuple

import torch

from planmill.kernels.moments.covariance.layer import Moments


class ShrunkCovariance(NamedTuple):
    """(1 - shrinkage) S + shrinkage (tr S / d) I.

    Attributes:
        covariance: [d, d] float64.
        shrinkage: between 0 and 1.
    """

    covariance: torch.Tensor
    shrinkage: float


def shrink_ledoit_wolf(moments: Moments) -> ShrunkCovariance:
    """The covariance that Ledoit and Wolf estimate: shrunk towards a multiple of the identity.

    With S the covariance of divisor N and m = tr S / d: beta = (sum_i |x_i - mean|^4 / N - |S|_F^2) / (N d),
    delta = (|S|_F^2 - d m^2) / d, shrinkage = min(beta, delta) / delta. The sum of fourth powers is streamed with the
    other moments.

    Args:
        moments: of at least one row.

    Returns:
        A ShrunkCovariance; equal to scikit-learn's LedoitWolf of the same rows.

    Raises:
        ValueError: no rows.

    Source: Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices" (2004), section 3.
    """
    n, d, m = _biased("shrink_ledoit_wolf", moments)
    squares = torch.linalg.vector_norm(moments.scatter).square() / n**2
    delta = (squares - d * m * m) / d
    beta = torch.minimum((moments.fourth / n - squares) / (n * d), delta)
    rho = 0.0 if float(beta) <= 0.0 else float(beta / delta)
    return _shrink(moments, m, rho)


def shrink_oas(moments: Moments) -> ShrunkCovariance:
    """The oracle approximating shrinkage of a Gaussian's covariance.

    With S of divisor N, m = tr S / d and a the mean of the squared entries of S: shrinkage =
    min(1, (a + m^2) / ((N + 1) (a - m^2 / d))); 1 where the divisor is 0.

    Args:
        moments: of at least one row.

    Returns:
        A ShrunkCovariance; equal to scikit-learn's OAS of the same rows.

    Raises:
        ValueError: no rows.

    Source: Chen, Wiesel, Eldar, Hero, "Shrinkage algorithms for MMSE covariance estimation" (2010), section 3.
    """
    n, d, m = _biased("shrink_oas", moments)
    a = torch.linalg.vector_norm(moments.scatter).square() / (n * d) ** 2
    divisor = float((n + 1) * (a - m * m / d))
    if d == 1:  # nothing to shrink; 0, as scikit-learn says
        return _shrink(moments, m, 0.0)
    rho = 1.0 if divisor == 0.0 else min(1.0, float(a + m * m) / divisor)
    return _shrink(moments, m, rho)


def shrink_by(moments: Moments, shrinkage: float) -> ShrunkCovariance:
    """The covariance shrunk by a given share: (1 - s) S + s (tr S / d) I with S of divisor N.

    Args:
        moments: of at least one row.
        shrinkage: s, from 0 (the covariance as it is) to 1 (a multiple of the identity).

    Returns:
        A ShrunkCovariance.

    Raises:
        ValueError: no rows, a share outside 0 to 1.

    Source: Friedman, "Regularized discriminant analysis" (1989), section 3.
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrink_by: shrinkage must be from 0 to 1, got {shrinkage}")
    _, _, m = _biased("shrink_by", moments)
    return _shrink(moments, m, shrinkage)


def ridge_precision(moments: Moments) -> torch.Tensor:
    """The precision matrix of GDA for CLIP: an empirical-Bayes ridge, finite for any number of rows.

    P = d ((N - 1) S + tr(S) I)^-1 with S the unbiased covariance. The bracket's condition number is at most N, so
    that a Cholesky factorisation serves.

    Args:
        moments: of at least two rows; of rows centred by their class means, for GDA.

    Returns:
        [d, d] float64, symmetric.

    Raises:
        ValueError: fewer than two rows.
        torch.linalg.LinAlgError: all rows equal: nothing can be estimated.

    Source: Wang et al., "A hard-to-beat baseline for training-free CLIP-based adaptation" (ICLR 2024), section 3.
    """
    covariance = moments.covariance(1)
    d = moments.width
    trace = covariance.trace()
    if float(trace) == 0.0:
        raise torch.linalg.LinAlgError("ridge_precision: all rows are equal, so that no direction has a variance")
    bracket = moments.scatter + trace * torch.eye(d, dtype=torch.float64, device=covariance.device)
    return d * torch.cholesky_inverse(torch.linalg.cholesky(bracket))


def _biased(op: str, moments: Moments) -> tuple[int, int, torch.Tensor]:
    """N, d and tr S / d, with S of divisor N."""
    n, d = int(moments.count), moments.width
    if n < 1:
        raise ValueError(f"{op}: needs at least one row, got none")
    return n, d, moments.scatter.trace() / (n * d)


def _shrink(moments: Moments, m: torch.Tensor, rho: float) -> ShrunkCovariance:
    shrunk = moments.scatter * ((1 - rho) / int(moments.count))
    shrunk.diagonal().add_(rho * m)
    return ShrunkCovariance(shrunk, rho)
