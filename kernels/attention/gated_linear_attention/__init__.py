"""Gated linear attention, causal, in streams and in both directions: the op, fla's layer and ViG's."""

from planmill.kernels.attention.gated_linear_attention.layer import GatedLinearAttention, ViGAttention
from planmill.kernels.attention.gated_linear_attention.op import attend_with_gates, stream_with_gates
from planmill.kernels.attention.gated_linear_attention.result import Streamed

__all__ = ["GatedLinearAttention", "Streamed", "ViGAttention", "attend_with_gates", "stream_with_gates"]
