"""Matching pursuit against a dictionary (MP-SAE), and the layer that holds the dictionary."""

from planmill.kernels.routing.matching_pursuit.layer import MatchingPursuit
from planmill.kernels.routing.matching_pursuit.op import pursue_matches

__all__ = ["MatchingPursuit", "pursue_matches"]
