"""Mahalanobis distances, and the anomaly detectors made of them."""

from planmill.kernels.moments.mahalanobis.layer import GaussianDetector, PositionGaussians
from planmill.kernels.moments.mahalanobis.op import factor_covariance, measure_mahalanobis

__all__ = ["GaussianDetector", "PositionGaussians", "factor_covariance", "measure_mahalanobis"]
