"""HaloNet's blocked local attention."""

from planmill.kernels.attention.halo_attention.layer import HaloAttention
from planmill.kernels.attention.halo_attention.op import attend_to_halo

__all__ = ["HaloAttention", "attend_to_halo"]
