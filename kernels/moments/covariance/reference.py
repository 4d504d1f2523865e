"""Mean, scatter and the two higher moments that shrinkage needs; float64."""

import torch


def covariance_reference(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mean [B, d], what float32 cuts off it [B, d], scatter [B, d, d], third [B, d], fourth [B]; float32."""
    count = max(x.shape[1], 1)
    mean = x.double().sum(1) / count
    z = x.double() - mean[:, None]
    square = (z * z).sum(2)  # |x - mu|^2
    scatter = z.mT @ z  # M2 = sum (x - mu)(x - mu)^T
    third = (square[:, :, None] * z).sum(1)  # sum |x - mu|^2 (x - mu)
    fourth = (square * square).sum(1)  # sum |x - mu|^4
    return mean.float(), (mean - mean.float()).float(), scatter.float(), third.float(), fourth.float()
