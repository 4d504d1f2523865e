"""Gaussian anomaly detectors: one Gaussian for all vectors, or one for each position (PaDiM)."""

import math

import torch
from torch import nn

from planmill.kernels.common.checks import check_float
from planmill.kernels.moments.covariance import Moments, covariance_moments
from planmill.kernels.moments.mahalanobis.op import factor_covariance, measure_mahalanobis
from planmill.kernels.moments.shrinkage import shrink_by, shrink_ledoit_wolf


class GaussianDetector(nn.Module):
    """Mahalanobis distance from one Gaussian fitted to good features; from the second order only, so nothing trains.

    Args:
        mean: [d].
        factor: [d (d + 1) / 2], see `factor_covariance`.
        projection: [k, d'] rows of principal axes that features [.., d'] are projected on first, or None.
        origin: [d'], subtracted before the projection.

    Shapes: features [N, d] -> distances [N] float32.

    Source: Rippel et al., "Modeling the distribution of normal data in pre-trained deep features for anomaly detection"
        (ICPR 2020), section 3: Ledoit-Wolf shrinkage; PCA keeps the directions of high variance, NPCA those of low.
    """

    mean: torch.Tensor
    factor: torch.Tensor
    projection: torch.Tensor | None
    origin: torch.Tensor | None

    def __init__(
        self,
        mean: torch.Tensor,
        factor: torch.Tensor,
        projection: torch.Tensor | None = None,
        origin: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("factor", factor)
        self.register_buffer("projection", None if projection is None else projection.float())
        self.register_buffer("origin", None if origin is None else origin.float())

    @classmethod
    def fit(
        cls,
        features: torch.Tensor | Moments,
        *,
        keep: str = "all",
        explained: float = 0.99,
        shrinkage: float | None = None,
    ) -> "GaussianDetector":
        """Fit on features [N, d], or on their Moments.

        Args:
            features: of good samples; float32, bfloat16 or float16.
            keep: "all"; "pca": the leading components up to the first whose cumulative share of the variance exceeds
                `explained`, inclusive; "npca": that component and all after it. At least one component is kept.
            explained: share of the variance, 0 to 1; published 0.95 and 0.99 for PCA, 0.99 to 0.9999 for NPCA.
            shrinkage: of the covariance, 0 to 1; None: as Ledoit and Wolf estimate it, which is published.

        Raises:
            ValueError: no rows, an unknown `keep`, `explained` or `shrinkage` outside 0 to 1.
            torch.linalg.LinAlgError: all rows are equal; too few rows where `shrinkage` is 0.
        """
        if keep not in ("all", "pca", "npca"):
            raise ValueError(f"GaussianDetector.fit: keep must be all, pca or npca, got {keep!r}")
        if not 0 <= explained <= 1:
            raise ValueError(f"GaussianDetector.fit: explained must be from 0 to 1, got {explained}")
        moments = features if isinstance(features, Moments) else Moments(features.shape[-1]).update(features)
        if keep == "all":
            return cls(moments.mean, _factor(moments, shrinkage))
        if isinstance(features, Moments):
            raise ValueError(f"GaussianDetector.fit: keep={keep!r} needs the features: the shrinkage is fitted again")
        values, vectors = torch.linalg.eigh(moments.covariance(0))
        values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
        share = values.cumsum(0) / values.sum().clamp_min(torch.finfo(torch.float64).tiny)
        last = min(int((share <= explained).sum()), len(values) - 1)
        axes = (vectors[:, : last + 1] if keep == "pca" else vectors[:, last:]).T.contiguous()
        rows = (features.float() - moments.mean.float()) @ axes.T.float()
        reduced = Moments(len(axes)).update(rows)
        return cls(reduced.mean, _factor(reduced, shrinkage), axes, moments.mean)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Distances [N] of features [N, d]."""
        if self.projection is not None and self.origin is not None:
            features = (features.float() - self.origin) @ self.projection.T
        return measure_mahalanobis(features, self.mean, self.factor)

    def threshold(self, sigma: float = 3.0) -> float:
        """The distance that a Gaussian's share within `sigma` standard deviations stays below, by chi-square.

        sqrt(chi2_k^-1(erf(sigma / sqrt 2))) with k the width; 3 means 99.73 %.

        Raises:
            ValueError: sigma outside (0, 8): beyond, the share is 1 in float64.
        """
        if not 0 < sigma < 8:
            raise ValueError(f"GaussianDetector.threshold: sigma must be above 0 and below 8, got {sigma}")
        beyond = math.erfc(sigma / math.sqrt(2))
        half_width = torch.tensor(self.mean.shape[0] / 2, dtype=torch.float64)
        low, high = 0.0, 1e9
        while high - low > 1e-12 * high:  # the regularised incomplete gamma function falls with its second argument
            middle = (low + high) / 2
            above = float(torch.special.gammaincc(half_width, torch.tensor(middle / 2, dtype=torch.float64))) > beyond
            low, high = (middle, high) if above else (low, middle)
        return math.sqrt(high)


def _factor(moments: Moments, shrinkage: float | None) -> torch.Tensor:
    shrunk = shrink_ledoit_wolf(moments) if shrinkage is None else shrink_by(moments, shrinkage)
    return factor_covariance(shrunk.covariance)


class PositionGaussians(nn.Module):
    """PaDiM: one Gaussian for each position of a feature map.

    Args:
        mean: [P, d].
        factor: [P, d (d + 1) / 2], see `factor_covariance`.

    Shapes: features [B, P, d] -> distances [B, P] float32.

    Source: Defard et al., "PaDiM: a patch distribution modeling framework for anomaly detection and localization" (ICPR
        2021), section 3; the covariance is unbiased, with 0.01 added to its diagonal as published (anomalib adds 1e-5
        more).
    """

    mean: torch.Tensor
    factor: torch.Tensor

    def __init__(self, mean: torch.Tensor, factor: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("factor", factor)

    @classmethod
    def fit(
        cls,
        features: torch.Tensor,
        *,
        regularization: float = 0.01,
        shrinkage: float = 0.0,
        dtype: torch.dtype = torch.bfloat16,
    ) -> "PositionGaussians":
        """Fit on the feature maps [N, P, d] of good images, N at least 2.

        Args:
            features: float32, bfloat16 or float16.
            regularization: added to the diagonal of every covariance.
            shrinkage: of every covariance towards its mean variance, 0 to 1, before that; 0 as published.
            dtype: of the stored triangles; bfloat16 is half the bytes, and its rounding (2^-9 a number) is far below
                the error of a covariance of a few hundred images.

        Raises:
            ValueError: wrong rank, fewer than two images, a shrinkage outside 0 to 1, NaN or infinity (the message
                names it).
            torch.linalg.LinAlgError: a covariance is singular (no regularization and too few images).
        """
        op = "PositionGaussians.fit"
        if features.dim() != 3 or features.shape[0] < 2:
            raise ValueError(f"{op}: features must be [N, P, d] with N at least 2, got {list(features.shape)}")
        check_float(op, "features", features)
        if not 0 <= shrinkage <= 1:
            raise ValueError(f"{op}: shrinkage must be from 0 to 1, got {shrinkage}")
        positions, d = features.shape[1:]
        mean = torch.empty(positions, d, dtype=torch.float32, device=features.device)
        factor = torch.empty(positions, d * (d + 1) // 2, dtype=dtype, device=features.device)
        step = max(1, (1 << 25) // max(1, d * d))  # covariances held at a time: 128 MB
        for first in range(0, positions, step):
            some = slice(first, first + step)
            moments = covariance_moments(features[:, some].transpose(0, 1))
            covariance = moments.covariance * (1 - shrinkage)
            trace = moments.covariance.diagonal(dim1=1, dim2=2).sum(1, keepdim=True)
            covariance.diagonal(dim1=1, dim2=2).add_(shrinkage * trace / d + regularization)
            mean[some], factor[some] = moments.mean, factor_covariance(covariance, dtype)
        return cls(mean, factor)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Distances [B, P] of feature maps [B, P, d]."""
        return measure_mahalanobis(features, self.mean, self.factor)
