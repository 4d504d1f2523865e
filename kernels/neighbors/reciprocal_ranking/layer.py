"""ReciprocalRanker: a gallery that queries are ranked against."""

import torch
from torch import nn

from planmill.kernels.neighbors.reciprocal_ranking.ranking import rerank_reciprocally


class ReciprocalRanker(nn.Module):
    """Re-ranked distances of queries to a stored gallery.

    Args:
        gallery: [m, D], float32, bfloat16 or float16.
        k1, k2, weight: as in `rerank_reciprocally`.

    Shapes: queries [n, D] -> distances [n, m] float32.

    Source: see `rerank_reciprocally`.
    """

    gallery: torch.Tensor

    def __init__(self, gallery: torch.Tensor, *, k1: int = 20, k2: int = 6, weight: float = 0.3) -> None:
        super().__init__()
        self.k1, self.k2, self.weight = k1, k2, weight
        self.register_buffer("gallery", gallery.detach())

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Distances of `queries` [n, D] to the gallery; [n, m]."""
        return rerank_reciprocally(queries, self.gallery, k1=self.k1, k2=self.k2, weight=self.weight)
