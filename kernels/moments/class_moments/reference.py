"""Counts, means and pooled within-class scatter; float64."""

import torch


def class_moments_reference(
    features: torch.Tensor, labels: torch.Tensor, classes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Means [K, d] and scatter [d, d] float32, counts [K] int32; rows of label -1 are left out."""
    if labels.device.type == "cpu" and bool(((labels < -1) | (labels >= classes)).any()):
        row = int(((labels < -1) | (labels >= classes)).nonzero()[0])
        raise ValueError(f"class_moments: labels must be from -1 to {classes - 1}, got {int(labels[row])} in row {row}")
    labelled = (labels >= 0) & (labels < classes)
    y = torch.where(labelled, labels, classes).long()  # what is left out goes to a class of its own, dropped below
    x = torch.where(labelled[:, None], features.double(), 0.0)
    n_c = torch.zeros(classes + 1, dtype=torch.float64, device=x.device).index_add(0, y, labelled.double())
    sums = torch.zeros(classes + 1, x.shape[1], dtype=torch.float64, device=x.device).index_add(0, y, x)
    mu = sums / n_c.clamp_min(1)[:, None]  # mu_c, 0 for an empty class
    z = torch.where(labelled[:, None], x - mu[y], 0.0)
    return mu[:-1].float(), (z.T @ z).float(), n_c[:-1].int()
