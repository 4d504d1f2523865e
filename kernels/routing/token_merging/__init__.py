"""Merging tokens by a plan."""

from planmill.kernels.routing.token_merging.op import merge_tokens

__all__ = ["merge_tokens"]
