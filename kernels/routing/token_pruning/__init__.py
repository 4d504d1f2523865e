"""Token pruning: scores of tokens, which of them stay, and the sequence without the others."""

from planmill.kernels.routing.token_pruning.layer import TokenEliminator, TokenSelector
from planmill.kernels.routing.token_pruning.scores import score_by_attention, score_by_logits, score_by_similarity
from planmill.kernels.routing.token_pruning.selection import (
    eliminate_tokens,
    gather_tokens,
    scatter_tokens,
    select_tokens,
)

__all__ = [
    "TokenEliminator",
    "TokenSelector",
    "eliminate_tokens",
    "gather_tokens",
    "scatter_tokens",
    "score_by_attention",
    "score_by_logits",
    "score_by_similarity",
    "select_tokens",
]
