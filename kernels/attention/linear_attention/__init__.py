"""Linear attention: features of queries and keys in place of the softmax, time and memory linear in the tokens."""

from planmill.kernels.attention.linear_attention.layer import LinearAttention
from planmill.kernels.attention.linear_attention.op import attend_linearly

__all__ = ["LinearAttention", "attend_linearly"]
