"""ConsistencyDetector: the confidence and a threshold from clean inputs."""

import torch
from torch import nn

from planmill.kernels.neighbors.neighborhood_consistency.op import score_consistency


class ConsistencyDetector(nn.Module):
    """Adversarial inputs by their low agreement with augmented copies of themselves.

    Args:
        weight, k: as in `score_consistency`.
        threshold: an input below it is called adversarial; `fit` finds it.

    Shapes: features [B, D], neighbors [B, T, D], logits [B, T, C], labels [B] -> confidence [B] float32.

    Source: see `score_consistency`; the threshold is taken from the false positive rate on clean inputs, as published.
    """

    threshold: torch.Tensor

    def __init__(self, *, weight: float = 0.8, k: int = 20, threshold: float = -torch.inf) -> None:
        super().__init__()
        self.weight, self.k = weight, k
        self.register_buffer("threshold", torch.tensor(threshold))

    @torch.no_grad()
    def fit(self, confidence: torch.Tensor, false_positives: float = 0.05) -> "ConsistencyDetector":
        """Choose the threshold below which at most this share of clean inputs' `confidence` [n] lies; returns self.

        Raises:
            ValueError: no inputs, or a share outside 0 to 1.
        """
        if confidence.dim() != 1 or len(confidence) == 0 or not 0 <= false_positives < 1:
            raise ValueError(
                f"ConsistencyDetector.fit: needs confidence [n] with n at least 1 and a share from 0 to below 1, "
                f"got {list(confidence.shape)} and {false_positives}"
            )
        ordered = confidence.float().sort().values
        self.threshold = ordered[int(false_positives * len(ordered))].to(self.threshold.device)
        return self

    def forward(
        self, features: torch.Tensor, neighbors: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        """Confidence of each input, [B]."""
        return score_consistency(features, neighbors, logits, labels, weight=self.weight, k=self.k)

    def detect(self, confidence: torch.Tensor) -> torch.Tensor:
        """[B] bool: confidence below the threshold, or NaN."""
        return ~(confidence >= self.threshold)
