"""Exact k nearest neighbours without the n x m matrix."""

from planmill.kernels.neighbors.knn.op import find_neighbors

__all__ = ["find_neighbors"]
