"""A weighted sum of few rows of a dictionary, per token."""

from planmill.kernels.routing.sparse_decoding.op import decode_sparsely

__all__ = ["decode_sparsely"]
