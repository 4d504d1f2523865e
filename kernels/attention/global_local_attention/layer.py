"""GlobalLocalAttention: the patches that the class token came to see attend to all tokens."""

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.routing.token_pruning import gather_tokens, select_tokens


class GlobalLocalAttention(nn.Module):
    """Cross attention from the highest-scored patches to all tokens (GLCA).

        O = softmax(Q_chosen K^T / sqrt(d)) V;  chosen: the share `keep` of the patches with the highest rollout

    DCAL runs one such layer after its 12 blocks of self-attention, with weights of its own, on the scores of
    `roll_out_row(queries, keys)[:, first:]`, and keeps 10 % of the patches for fine-grained classification, 30 % for
    re-identification. No code is published: that the class token is among the queries (the classifier of this branch
    reads it), the number of patches, ceil(keep N), and the names of the weights are our reading and not verified.

    Attention is `scaled_dot_product_attention`; there is no kernel, since a library's is as good.

    Args:
        dim, heads: D, and H heads of D / H channels.
        keep: share (float) or number (int) of patches, as in `select_tokens`.
        first: tokens before the patches, which are always queries: the class token.
        bias: whether query, key and value projections have one.

    Shapes: x [B, first + N, D], scores [B, N] -> [B, first + K, D], indices [B, K] int32 of the patches, best first.

    Source: Zhu et al., "Dual cross-attention learning for fine-grained visual categorization and object
    re-identification" (CVPR 2022), section 3.2.
    """

    def __init__(self, dim: int, heads: int, keep: int | float = 0.1, *, first: int = 1, bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"GlobalLocalAttention: dim must be a multiple of heads = {heads}, got {dim}")
        self.heads, self.keep, self.first = heads, keep, first
        self.q = nn.Linear(dim, dim, bias=bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The chosen tokens after attention, and which patches they are."""
        if x.dim() != 3 or x.shape[2] != self.q.in_features:
            raise ValueError(f"GlobalLocalAttention: x must be [B, N, {self.q.in_features}], got {list(x.shape)}")
        patches = x.shape[1] - self.first
        if scores.shape != (x.shape[0], patches):
            raise ValueError(
                f"GlobalLocalAttention: scores must be [{x.shape[0]}, {patches}], got {list(scores.shape)}"
            )
        indices = select_tokens(scores, self.keep, order="score")
        chosen = gather_tokens(x, indices, first=self.first, count=patches)
        q, (k, v) = self._heads(self.q(chosen)), (self._heads(t) for t in self.kv(x).chunk(2, -1))
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)), indices

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def extra_repr(self) -> str:
        """The settings."""
        return f"heads={self.heads}, keep={self.keep}, first={self.first}"
