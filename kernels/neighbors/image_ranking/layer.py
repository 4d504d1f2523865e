"""ImageIndex: local features of many images, ranked for a query image."""

import torch
from torch import nn

from planmill.kernels.neighbors.image_ranking.score import EXPONENT, REACH, score_images


class ImageIndex(nn.Module):
    """Ranks stored images by their local features alone, without a global descriptor and without a second stage.

    Args:
        features: [m, D], float32, bfloat16 or float16: the features of S images, one image after the other.
        offsets: [S + 1], int32 or int64: image s has rows `offsets[s]` to `offsets[s + 1]`.
        reach, exponent: as in `score_images`.

    Shapes: queries [n, D] -> scores [S] float32.

    Source: see `score_images`.
    """

    features: torch.Tensor
    offsets: torch.Tensor

    def __init__(
        self, features: torch.Tensor, offsets: torch.Tensor, *, reach: float = REACH, exponent: float = EXPONENT
    ) -> None:
        super().__init__()
        self.reach, self.exponent = reach, exponent
        self.register_buffer("features", features.detach())
        self.register_buffer("offsets", offsets)
        self(features[:0])  # checks the arguments

    def forward(self, queries: torch.Tensor) -> torch.Tensor:
        """Score every image for the features `queries` [n, D] of one image; [S]."""
        return score_images(queries, self.features, self.offsets, reach=self.reach, exponent=self.exponent)

    def rank(self, queries: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k best images: scores [k] float32, descending, and indices [k] int32; ties to the lower index.

        Raises:
            ValueError: k is not from 1 to the number of images.
        """
        images = self.offsets.shape[0] - 1
        if not 1 <= k <= images:
            raise ValueError(f"ImageIndex.rank: k must be from 1 to {images}, got {k}")
        scores, order = self(queries).sort(descending=True, stable=True)
        return scores[:k], order[:k].int()

    def extra_repr(self) -> str:
        """Sizes and settings."""
        m, d = self.features.shape
        return f"images={self.offsets.shape[0] - 1}, rows={m}, width={d}, reach={self.reach}"
