"""Which token is merged into which: partitions of a sequence and the match by cosine similarity."""

from planmill.kernels.routing.token_matching.op import match_tokens
from planmill.kernels.routing.token_matching.partition import TokenPartition
from planmill.kernels.routing.token_matching.plan import MergePlan

__all__ = ["MergePlan", "TokenPartition", "match_tokens"]
