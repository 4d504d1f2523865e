"""Scores of new images against a bank of stored ones, and the layer that keeps the bank."""

from planmill.kernels.neighbors.bank_score.layer import MutualScorer
from planmill.kernels.neighbors.bank_score.op import score_against_bank

__all__ = ["MutualScorer", "score_against_bank"]
