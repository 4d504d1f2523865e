"""HashEmbedding: one table for all categorical features."""

from collections.abc import Sequence

import torch
from torch import nn

from planmill.kernels.routing.hash_embedding.op import embed_hashed

LIMITS = torch.iinfo(torch.int64)


class HashEmbedding(nn.Module):
    """All categorical features in one shared table: feature f takes `features[f]` lookups of width `width`.

    Args:
        features: lookups of each feature, at least 1 each: its width in the output is that times `width`.
        rows: M, rows of the table.
        width: d, width of one lookup.
        seed: of the hashes: layers of the same seed and features have the same hashes.
        pooling: "sum" or "mean", for features with several values.

    The table is initialised as that of `nn.Embedding`: normal with variance 1. State: `weight` [M, d] and `seeds` [J].

    Raises:
        ValueError: no lookup, a size that is not positive.

    Shapes: values [B, F] or [B, F, L] int64 -> [B, sum(features) * d].

    Source: Unified Embedding (Coleman et al., NeurIPS 2023); see `embed_hashed` for what is ours.
    """

    seeds: torch.Tensor
    lookups: torch.Tensor

    def __init__(
        self,
        features: Sequence[int],
        rows: int,
        width: int,
        *,
        seed: int = 0,
        pooling: str = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not features or min(features) < 1 or rows < 1 or width < 1:
            raise ValueError(
                f"HashEmbedding: features, rows and width must be positive, got {list(features)}, {rows} and {width}"
            )
        self.features, self.rows, self.width, self.pooling = tuple(features), rows, width, pooling
        generator = torch.Generator().manual_seed(seed)
        seeds = torch.randint(LIMITS.min, LIMITS.max, (sum(features),), generator=generator)
        self.weight = nn.Parameter(torch.empty(rows, width, device=device, dtype=dtype))
        self.register_buffer("seeds", seeds.to(device))
        which = torch.arange(len(features)).repeat_interleave(torch.tensor(self.features)).int()
        self.register_buffer("lookups", which.to(device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew; the hashes stay."""
        nn.init.normal_(self.weight)

    def forward(
        self, values: torch.Tensor, lengths: torch.Tensor | None = None, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """values [B, F] or [B, F, L] int64 to [B, sum(features) * width]; see `embed_hashed`."""
        return embed_hashed(
            values, self.weight, self.seeds, self.lookups, lengths=lengths, weights=weights, pooling=self.pooling
        )

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"features={self.features}, rows={self.rows}, width={self.width}, pooling={self.pooling!r}"
