"""Maximum similarity of each query to each segment of a database."""

from planmill.kernels.neighbors.segmented_max.op import maximize_by_segment

__all__ = ["maximize_by_segment"]
