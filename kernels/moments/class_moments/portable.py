"""Sums over classes as a product with their labels: a row without a class is in none."""

import torch

from planmill.kernels.common.portable import sum_rows


def class_moments_portable(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    labelled = (labels >= 0) & (labels < classes)
    y = labels.long()
    x = torch.where(labelled[:, None], features.float(), 0.0)
    which = torch.arange(classes, device=y.device)[:, None] == y  # [K, N]
    count = which.float().sum(1)
    mean = sum_rows(which, x) / count.clamp_min(1)[:, None]
    z = torch.where(labelled[:, None], x - mean[y.clamp(0, classes - 1)], 0.0)
    return mean, z.T @ z, count.int()
