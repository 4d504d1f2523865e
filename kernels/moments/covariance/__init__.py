"""Mean and covariance in one pass, and their accumulation over batches."""

from planmill.kernels.moments.covariance.layer import Moments
from planmill.kernels.moments.covariance.op import covariance_moments
from planmill.kernels.moments.covariance.result import CovarianceMoments

__all__ = ["CovarianceMoments", "Moments", "covariance_moments"]
