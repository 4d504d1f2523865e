"""How far the features of a classifier have collapsed to its class means."""

from planmill.kernels.moments.neural_collapse.functions import CollapseMetrics, measure_collapse

__all__ = ["CollapseMetrics", "measure_collapse"]
