"""member(c) = the w' = min(w, N) tokens of largest S[n, c] = <x_n / |x_n|, mu_c>; ties to the lower index."""

import torch
from torch.nn import functional as F


def cluster_scores(x: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """S [B, H, C, N] in float64; NaN as -inf."""
    xn = F.normalize(x.double(), dim=-1)
    S = torch.einsum("bhnd,hcd->bhcn", xn, centroids.double())  # mu is not normalised
    return torch.where(S.isnan(), -torch.inf, S)


def cluster_members_reference(x: torch.Tensor, centroids: torch.Tensor, window: int) -> torch.Tensor:
    """Indices [B, H, C, w'] int32, ascending."""
    order = cluster_scores(x, centroids).sort(dim=-1, descending=True, stable=True).indices[..., :window]
    return order.sort(-1).values.int()
