"""Greedy k-centre choice: few rows that leave no row far away."""

from planmill.kernels.neighbors.coreset.op import choose_coreset

__all__ = ["choose_coreset"]
