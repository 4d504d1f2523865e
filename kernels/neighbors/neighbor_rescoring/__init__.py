"""Re-scoring of images by their neighbours (RsCIN of MuSc)."""

from planmill.kernels.neighbors.neighbor_rescoring.op import rescore_by_neighbors

__all__ = ["rescore_by_neighbors"]
