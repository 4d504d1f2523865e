"""Cross-covariances of heads, and the moment probing head made of them."""

from planmill.kernels.moments.head_covariance.layer import MomentProbingHead, RecalibrationAdapter
from planmill.kernels.moments.head_covariance.op import cross_covariance

__all__ = ["MomentProbingHead", "RecalibrationAdapter", "cross_covariance"]
