"""Redundancy of the channels of two views."""

from planmill.kernels.moments.cross_correlation.functions import Redundancy, measure_redundancy

__all__ = ["Redundancy", "measure_redundancy"]
