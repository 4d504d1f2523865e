"""Mutual nearest neighbours of two feature maps."""

from planmill.kernels.neighbors.mutual_matching.op import list_matches, match_mutually
from planmill.kernels.neighbors.mutual_matching.result import MutualMatches

__all__ = ["MutualMatches", "list_matches", "match_mutually"]
