"""Re-ranking by reciprocal neighbours, from lists of neighbours instead of the matrix of all pairs."""

from planmill.kernels.neighbors.reciprocal_ranking.layer import ReciprocalRanker
from planmill.kernels.neighbors.reciprocal_ranking.ranking import rerank_reciprocally

__all__ = ["ReciprocalRanker", "rerank_reciprocally"]
