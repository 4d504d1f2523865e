"""The best point of the densest cluster of predictions (MVP)."""

from planmill.kernels.neighbors.densest_cluster.cluster import pick_densest

__all__ = ["pick_densest"]
