"""Mutual scoring of unlabelled images (MuSc)."""

from planmill.kernels.neighbors.mutual_score.op import score_mutually

__all__ = ["score_mutually"]
