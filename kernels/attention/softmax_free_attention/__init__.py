"""SOFT: attention through landmarks and a pseudo-inverse instead of a softmax, and the layer."""

from planmill.kernels.attention.softmax_free_attention.layer import SoftmaxFreeAttention
from planmill.kernels.attention.softmax_free_attention.op import attend_softmax_free

__all__ = ["SoftmaxFreeAttention", "attend_softmax_free"]
