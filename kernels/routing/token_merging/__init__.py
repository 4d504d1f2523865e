"""Merging tokens by a plan, and giving every token its row back."""

from planmill.kernels.routing.token_merging.op import merge_tokens, unmerge_tokens

__all__ = ["merge_tokens", "unmerge_tokens"]
