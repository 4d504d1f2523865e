"""Nearest neighbours: segmented maxima, exact kNN, mutual scoring, neighbourhood pooling, re-scoring."""

from planmill.kernels.common.discovery import export_ops

__all__ = export_ops(__name__, globals())
