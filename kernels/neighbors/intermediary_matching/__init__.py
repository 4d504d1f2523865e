"""Matching through intermediaries (FAIM): found with one feature, compared with another."""

from planmill.kernels.neighbors.intermediary_matching.layer import IntermediaryMatcher
from planmill.kernels.neighbors.intermediary_matching.matching import average_intermediaries, match_intermediaries

__all__ = ["IntermediaryMatcher", "average_intermediaries", "match_intermediaries"]
