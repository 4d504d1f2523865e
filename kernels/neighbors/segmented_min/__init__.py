"""Distance of each query to the nearest row of each segment of a database."""

from planmill.kernels.neighbors.segmented_min.op import minimize_by_segment

__all__ = ["minimize_by_segment"]
