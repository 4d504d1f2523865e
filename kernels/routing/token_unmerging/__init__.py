"""Giving every token its merged row back, on top of a residual stream."""

from planmill.kernels.routing.token_unmerging.op import unmerge_tokens

__all__ = ["unmerge_tokens"]
