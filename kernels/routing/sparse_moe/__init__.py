"""Sparse mixture-of-experts layers that take the weights of the published models."""

from planmill.kernels.routing.sparse_moe.layer import SparseMoE

__all__ = ["SparseMoE"]
