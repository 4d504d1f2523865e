"""Generalised-mean pooling of tokens, with one exponent for each group of channels (GGeM)."""

from planmill.kernels.attention.generalized_mean.layer import GroupedPowerMean
from planmill.kernels.attention.generalized_mean.pooling import average_by_power

__all__ = ["GroupedPowerMean", "average_by_power"]
