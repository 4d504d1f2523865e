"""Greedy k-centre choice in float64, one centre after another."""

import torch


def coreset_reference(features: torch.Tensor, distances: torch.Tensor, count: int, start: int) -> torch.Tensor:
    """Rows [count] int32 of `features` [N, D], in the order of their choice; `distances` [N], or [0] for none."""
    f = features.double()
    nearest = distances.double().square() if len(distances) else f.new_full((len(f),), torch.inf)  # min_j |f - c_j|^2
    usable = f.isfinite().all(1) & ~nearest.isnan()
    nearest = torch.where(usable, nearest, -1.0)
    chosen = torch.empty(count, dtype=torch.int64, device=f.device)
    for step in range(count):
        chosen[step] = nearest.argmax() if step or start < 0 else start  # the first of equals
        centre = chosen[step]
        squared = (f - f[centre]).square().sum(1)
        nearest = torch.where(squared < nearest, squared, nearest)  # a centre with NaN or infinity is near to nothing
        nearest[centre] = -torch.inf
    return chosen.int()
