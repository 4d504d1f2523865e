"""Attention over all tokens, heads side by side in its result."""

from planmill.kernels.attention.softmax_attention.op import attend_by_softmax

__all__ = ["attend_by_softmax"]
