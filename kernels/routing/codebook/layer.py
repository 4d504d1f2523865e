"""Codebook and GroupedCodebook: exact nearest codes without the [T, M] matrix, and their mean or sum."""

from collections.abc import Iterable

import torch
from torch import nn

from planmill.kernels.common.checks import check_choice
from planmill.kernels.neighbors import find_neighbors
from planmill.kernels.routing.sparse_decoding import decode_sparsely

METRICS = ("cosine", "l2")
REDUCTIONS = ("mean", "sum")


class Codebook(nn.Module):
    """Replaces activations by the mean of their k nearest codes, as codebook features do.

    u = LayerNorm(x);  idx = the k codes with the largest <u, c> / |c| ("cosine") or the smallest |u - c| ("l2");
    y = (1 / k) sum_j c[idx_j], of the codes as they are, not normalised.

    The output replaces the activation: there is no residual. State dicts of the published `CodebookLayer` load as they
    are (`codebook.weight`, `ln.weight`, `ln.bias`). A code of length zero has similarity 0 instead of NaN; a code that
    holds NaN or infinity is never chosen. The gradient is the published straight-through one: the codes get theirs
    through the sum, and `u` that of the output.

    Args:
        channels: D.
        codes: M.
        k: codes per token, 1 to 1024.
        metric: "cosine" or "l2", the default of the published code.
        reduction: "mean", as in the published code, or "sum", as in the paper's text.

    Shapes: x [..., D] -> [..., D].

    Raises:
        ValueError: k outside 1 to `codes`, an unknown metric or reduction.

    Source: Tamkin, Taufeeque, Goodman 2023, "Codebook Features: Sparse and Discrete Interpretability for Neural
    Networks", section 2, and its public implementation.
    """

    disabled: torch.Tensor

    def __init__(self, channels: int, codes: int, k: int = 1, metric: str = "l2", *, reduction: str = "mean") -> None:
        super().__init__()
        check_choice("Codebook", "metric", metric, METRICS)
        check_choice("Codebook", "reduction", reduction, REDUCTIONS)
        if not 1 <= k <= min(codes, 1024):
            raise ValueError(f"Codebook: k must be from 1 to {min(codes, 1024)}, got {k}")
        self.k, self.metric, self.reduction = k, metric, reduction
        self.codebook = nn.Embedding(codes, channels)
        self.ln = nn.LayerNorm(channels, eps=1e-5)
        self.keep_k = True
        self.register_buffer("disabled", torch.zeros(codes, dtype=torch.bool), persistent=False)
        self.any_disabled = False

    def disable(self, codes: Iterable[int], *, keep_k: bool = True) -> "Codebook":
        """Switch codes off, and all others on; returns self.

        Args:
            codes: which; none of them: all codes are on.
            keep_k: the k nearest of the codes that are on are taken (similarity -inf before the choice); otherwise the
                k nearest of all, of which disabled ones count as zero while the mean is still over k.

        Raises:
            ValueError: a code outside 0 to M - 1, or fewer than k codes left on with `keep_k`.
        """
        chosen = sorted(set(codes))
        count = self.codebook.num_embeddings
        if chosen and not (chosen[0] >= 0 and chosen[-1] < count):
            raise ValueError(f"Codebook: codes must be from 0 to {count - 1}, got {chosen[0]} to {chosen[-1]}")
        if keep_k and count - len(chosen) < self.k:
            raise ValueError(f"Codebook: {self.k} codes must stay on, {count - len(chosen)} do")
        self.disabled.zero_()
        self.disabled[chosen] = True
        self.keep_k, self.any_disabled = keep_k, bool(chosen)
        return self

    def nearest(self, x: torch.Tensor) -> torch.Tensor:
        """The codes chosen for x [..., D]: [..., k] int32, nearest first; -1 where a disabled code was chosen."""
        return self._nearest(self.ln(x))

    def _nearest(self, u: torch.Tensor) -> torch.Tensor:
        codes = self.codebook.weight.detach()
        if self.any_disabled and self.keep_k:
            codes = codes.masked_fill(self.disabled[:, None], torch.nan)  # rows that hold NaN match nothing
        _, indices = find_neighbors(u.detach().flatten(0, -2), codes, self.k, self.metric)
        if self.any_disabled and not self.keep_k:
            indices = torch.where(self.disabled[indices.clamp_min(0)], -1, indices)
        return indices.unflatten(0, u.shape[:-1])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean (or sum) of the codes nearest to x [..., D]."""
        u = self.ln(x)
        indices = self._nearest(u).flatten(0, -2)
        share = 1.0 / self.k if self.reduction == "mean" else 1.0
        weights = torch.full(indices.shape, share, dtype=torch.float32, device=x.device)
        y = decode_sparsely(weights, indices, self.codebook.weight).unflatten(0, x.shape[:-1])
        if torch.is_grad_enabled() and u.requires_grad:
            y = y + (u - u.detach())  # straight through
        return y

    def extra_repr(self) -> str:
        """Settings."""
        return f"k={self.k}, metric={self.metric!r}, reduction={self.reduction!r}"


class GroupedCodebook(nn.Module):
    """Channels in G chunks, each with its own LayerNorm and codebook, side by side again.

    State dicts of the published `GroupCodebookLayer` load as they are (`codebook.<g>.codebook.weight`, ...).

    Args:
        channels: D, a multiple of `groups`.
        codes: M of each codebook.
        groups: G.
        k, metric, reduction: as `Codebook`.

    Shapes: x [..., D] -> [..., D].

    Raises:
        ValueError: channels that are no multiple of `groups`, and what `Codebook` raises.

    Source: as `Codebook`.
    """

    def __init__(
        self, channels: int, codes: int, groups: int, k: int = 1, metric: str = "l2", *, reduction: str = "mean"
    ) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"GroupedCodebook: channels must be a multiple of groups, got {channels} and {groups}")
        width = channels // groups
        self.codebook = nn.ModuleList(Codebook(width, codes, k, metric, reduction=reduction) for _ in range(groups))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Each chunk of x [..., D] through its codebook."""
        chunks = x.chunk(len(self.codebook), dim=-1)
        return torch.cat([book(chunk) for book, chunk in zip(self.codebook, chunks, strict=True)], dim=-1)
