"""First centres: rows drawn at random, or far apart."""

import math

import torch


def draw_rows(features: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Indices [K] of distinct rows, all equally likely."""
    return torch.randperm(features.shape[0], generator=generator)[:clusters].to(features.device)


def spread_rows(features: torch.Tensor, clusters: int, generator: torch.Generator) -> torch.Tensor:
    """Indices [K] of rows drawn one after the other with probability D(x)^2 / sum D^2 (k-means++).

    D is the distance from the rows drawn so far. Of 2 + floor(ln K) draws the one is kept that lowers the sum of D^2
    most, as the paper's last section proposes. Where all rows have been drawn, up to copies, rows repeat.
    """
    n, trials = features.shape[0], 2 + int(math.log(clusters))
    x = features - features.double().mean(0).to(features.dtype)
    lengths = x.square().sum(1)
    row = torch.randint(n, (1,), generator=generator).to(x.device)
    chosen = [row]
    nearest = (lengths[:, None] + lengths[row] - 2 * x @ x[row].T).clamp_min(0).index_fill(0, row, 0)
    while len(chosen) < clusters:
        sums = nearest[:, 0].double().cumsum(0)
        drawn = torch.rand(trials, dtype=torch.float64, generator=generator).to(x.device) * sums[-1]
        rows = torch.searchsorted(sums, drawn, right=True).clamp_max(n - 1)
        left = torch.minimum(nearest, lengths[:, None] + lengths[rows] - 2 * x @ x[rows].T).clamp_min(0)
        best = left.sum(0, dtype=torch.float64).argmin()[None]
        chosen.append(rows[best])
        nearest = left[:, best].index_fill(0, rows[best], 0)
    return torch.cat(chosen)
