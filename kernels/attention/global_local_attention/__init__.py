"""Global-local cross attention (DCAL): which patches the class token came to see, and attention from them to all."""

from planmill.kernels.attention.global_local_attention.layer import GlobalLocalAttention
from planmill.kernels.attention.global_local_attention.rollout import roll_out_row

__all__ = ["GlobalLocalAttention", "roll_out_row"]
