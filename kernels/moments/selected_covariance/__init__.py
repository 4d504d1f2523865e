"""Chosen entries of a covariance as a penalty."""

from planmill.kernels.moments.selected_covariance.functions import penalize_covariances

__all__ = ["penalize_covariances"]
