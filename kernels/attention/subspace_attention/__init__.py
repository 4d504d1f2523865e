"""Subspace attention (ULSAM): one map over the positions for each group of channels."""

from planmill.kernels.attention.subspace_attention.layer import SubspaceAttention
from planmill.kernels.attention.subspace_attention.maps import attend_in_subspaces

__all__ = ["SubspaceAttention", "attend_in_subspaces"]
