"""Sums over classes as products with the one-hot labels."""

import torch


def class_moments_portable(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    hot = (labels[:, None] == torch.arange(classes, dtype=labels.dtype, device=labels.device)).float()  # [N, K]
    labelled = hot.sum(1, keepdim=True) > 0
    x = torch.where(labelled, features.float(), 0.0)
    count = hot.sum(0)
    mean = (hot.T @ x) / count.clamp_min(1)[:, None]
    z = torch.where(labelled, x - hot @ mean, 0.0)
    return mean, z.T @ z, count.int()
