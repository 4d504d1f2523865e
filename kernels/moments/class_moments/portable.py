"""Sums over classes by scattering, whatever the labels are: a row without a class adds to one that is dropped."""

import torch


def class_moments_portable(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    labelled = (labels >= 0) & (labels < classes)
    y = torch.where(labelled, labels, classes).long()
    x = torch.where(labelled[:, None], features.float(), 0.0)
    at = y[:, None].expand_as(x)
    count = x.new_zeros(classes + 1).scatter_add(0, y, labelled.float())
    mean = x.new_zeros(classes + 1, x.shape[1]).scatter_add(0, at, x) / count.clamp_min(1)[:, None]
    z = torch.where(labelled[:, None], x - mean[y], 0.0)
    return mean[:-1], z.T @ z, count[:-1].int()
