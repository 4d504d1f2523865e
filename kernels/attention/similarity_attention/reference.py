"""S = gamma (f f^T - beta mean(f f^T)) of unit features f; S < 0 does not count; out = softmax(S) V."""

import torch
from torch.nn import functional as F


def scores(features: torch.Tensor, beta: float, gamma: float, batch_coupled: bool) -> torch.Tensor:
    """S [B, M, M] in float64."""
    f = F.normalize(features.double(), dim=2, eps=1e-12)
    means = f.mean(1).square().sum(1)[:, None, None]  # of all pairs: |mean_i f_i|^2
    if batch_coupled:
        means = means.mean(0, keepdim=True)
    return gamma * (f @ f.mT - beta * means)


def similarity_attention_reference(
    features: torch.Tensor, values: torch.Tensor, beta: float, gamma: float, batch_coupled: bool
) -> torch.Tensor:
    """[B, M, C], dtype of the values."""
    if values.numel() == 0:
        return torch.zeros_like(values)
    S = scores(features, beta, gamma, batch_coupled)
    allowed = S >= 0
    alone = ~allowed.any(2, keepdim=True)
    e = torch.exp(S.masked_fill(~allowed, -torch.inf) - S.detach().amax(2, keepdim=True).nan_to_num())
    P = e / e.sum(2, keepdim=True).clamp_min(1)
    P = torch.where(alone, torch.eye(P.shape[1], dtype=P.dtype, device=P.device), P)  # no key is left: its own value
    P = P.masked_fill(S.isnan().all(2, keepdim=True), torch.nan)
    return (P @ values.double()).to(values.dtype)
