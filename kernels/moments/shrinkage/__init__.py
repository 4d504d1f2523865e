"""Shrunk covariances and precisions from streamed moments."""

from planmill.kernels.moments.shrinkage.functions import (
    ShrunkCovariance,
    ridge_precision,
    shrink_by,
    shrink_ledoit_wolf,
    shrink_oas,
)

__all__ = ["ShrunkCovariance", "ridge_precision", "shrink_by", "shrink_ledoit_wolf", "shrink_oas"]
