"""TokenSelector and TokenEliminator: pruning between two blocks of a transformer, with the published settings."""

import torch
from torch import nn

from planmill.kernels.routing.token_pruning.selection import eliminate_tokens, gather_tokens, select_tokens


class TokenSelector(nn.Module):
    """Keep the best tokens of one part of a sequence: a fixed share, hence fixed shapes.

    FSVG runs it after attention and residual, before the MLP, of blocks 3, 6, 9 (base) or 6, 12, 18 (large), on
    [class | picture | text] with the attention that the picture receives from the text:

        scores = score_by_attention(q[:, :, -77:], k)[:, 1 : 1 + picture_tokens]
        x, chosen = TokenSelector()(x, scores)

    Args:
        keep: share (float) or number (int) of tokens, as in `select_tokens`.
        first: tokens before the part, which stay.
        order: "score" reorders the part by descending score, as published; "position" keeps its order.

    Shapes: x [B, L, D], scores [B, N] of tokens first to first + N - 1 -> [B, L - N + K, D], indices [B, K] int32.

    Source: FSVG (public code).
    """

    def __init__(self, keep: int | float = 0.7, *, first: int = 1, order: str = "score") -> None:
        super().__init__()
        self.keep, self.first, self.order = keep, first, order

    def forward(self, x: torch.Tensor, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The shorter sequence, and which of the N tokens it holds."""
        indices = select_tokens(scores, self.keep, order=self.order)
        return gather_tokens(x, indices, first=self.first, count=scores.shape[1]), indices

    def extra_repr(self) -> str:
        """The settings."""
        return f"keep={self.keep}, first={self.first}, order={self.order!r}"


class TokenEliminator(nn.Module):
    """Drop the tokens of a picture whose smoothed score is low; the number depends on the picture.

    EEVG runs it in each of its decoder layers after self-attention, on [register | picture], and takes the results from
    one layer to the next:

        scores = score_by_logits(q[:, :, 0], k[:, :, 1:], mask=None if positions is None else positions >= 0)
        x, positions, lengths = eliminator(x, scores, positions)

    Rows beyond a sample's length are zero and their position is -1: they must be masked out of attention
    (`positions >= 0`), and then a layer on the padded sequence computes what it computes on the short one.

    Args:
        grid: (height, width) of the picture in tokens.
        threshold, retention, coupled, seed: as in `eliminate_tokens`.
        first: tokens before the picture, which stay.
        trim: cut the sequence to the longest sample. It waits for the device, and the shapes depend on the values: the
            layer cannot be exported then.

    Shapes: x [B, first + N, D], scores [B, N], positions [B, N] integers or None -> x [B, first + N, D], positions
    [B, N] int32, lengths [B] int32 (N becomes the longest length with `trim`).

    Source: EEVG (public code).
    """

    def __init__(
        self,
        grid: tuple[int, int],
        threshold: float = 0.015,
        *,
        retention: float = 0.1,
        coupled: bool = False,
        seed: int = 0,
        first: int = 1,
        trim: bool = False,
    ) -> None:
        super().__init__()
        self.grid, self.threshold, self.retention = (int(grid[0]), int(grid[1])), threshold, retention
        self.coupled, self.seed, self.first, self.trim = coupled, seed, first, trim

    def forward(
        self, x: torch.Tensor, scores: torch.Tensor, positions: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The sequence of the tokens that stay, their cells of the grid, and how many they are."""
        indices, lengths = eliminate_tokens(
            scores,
            self.grid,
            positions=positions,
            threshold=self.threshold,
            retention=self.retention,
            coupled=self.coupled,
            seed=self.seed,
        )
        if self.trim:
            indices = indices[:, : int(lengths.max()) if len(lengths) else 0]
        y = gather_tokens(x, indices, first=self.first, count=scores.shape[1])
        if positions is not None and scores.shape[1]:
            cells = positions.gather(1, indices.clamp_min(0).long()).int()
            indices = torch.where(indices < 0, -1, cells)
        return y, indices, lengths

    def extra_repr(self) -> str:
        """The settings."""
        settings = ("grid", "threshold", "retention", "coupled", "seed", "first", "trim")
        return ", ".join(f"{name}={getattr(self, name)}" for name in settings)
