"""Gated linear attention, causal or in both directions: the op, fla's layer and ViG's."""

from planmill.kernels.attention.gated_linear_attention.op import attend_with_gates, stream_with_gates
from planmill.kernels.attention.gated_linear_attention.result import Streamed

__all__ = ["Streamed", "attend_with_gates", "stream_with_gates"]
