"""Nearest neighbours within a radius of a position and / or within a segment, and the index for large databases."""

from planmill.kernels.neighbors.constrained_search.layer import GridIndex
from planmill.kernels.neighbors.constrained_search.op import find_constrained_neighbors

__all__ = ["GridIndex", "find_constrained_neighbors"]
