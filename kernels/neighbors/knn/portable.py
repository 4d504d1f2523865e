"""Screened by products, then measured by differences: the n x m x D differences of all pairs never exist."""

import torch

from planmill.kernels.neighbors.knn.reference import nearest

MARGIN = 16  # candidates beyond k that are measured


def scale_of(*tensors: torch.Tensor) -> torch.Tensor:
    """A power of two near the largest value, dividing by which is exact and keeps squares in range."""
    largest = torch.stack([t.abs().amax() for t in tensors]).amax()
    return torch.exp2(torch.where(largest > 0, largest, 1).log2().floor())


def screened(q: torch.Tensor, x: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Squared distances [n, m] up to a constant of each query, by products of centred rows; inf where not valid.

    The centre is a row and not the mean: small integers stay small integers, and their ties stay ties.
    """
    centre = x.index_select(0, valid.any(0).int().argmax(0, keepdim=True))
    a, b = q - centre, x - centre
    return torch.where(valid, b.square().sum(1) - 2 * a @ b.T, torch.inf)


def distances(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """|q_i - rows_ij|: [n, k] of q [n, D] and rows [n, k, D]."""
    return (q[:, None] - rows).square().sum(2).sqrt()


def nearest_portable(
    q: torch.Tensor, x: torch.Tensor, valid: torch.Tensor, k: int, metric: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `nearest` of the reference; in float32."""
    if metric == "dot":
        return nearest(q, x, valid, k, metric)
    q, x = (torch.where(t.isfinite(), t, 0) for t in (q, x))
    scale = scale_of(q, x)
    q, x = q / scale, x / scale
    if metric == "cosine":
        return nearest(q, x, valid, k, metric)
    some = min(k + MARGIN, x.shape[0]) if isinstance(x.shape[0], int) else x.shape[0]
    candidates = screened(q, x, valid).argsort(dim=1, stable=True)[:, :some].sort(1).values  # equal: the lower row
    distance = torch.where(valid.gather(1, candidates), distances(q, x[candidates]), torch.inf)
    order = distance.argsort(dim=1, stable=True)[:, :k]
    found, rows = distance.gather(1, order) * scale, candidates.gather(1, order)
    rows = torch.where(found == torch.inf, -1, rows)
    pad = (0, k - found.shape[1])
    found = torch.nn.functional.pad(found**2 if metric == "l2sq" else found, pad, value=torch.inf)
    return found, torch.nn.functional.pad(rows, pad, value=-1).int()


def knn_portable(
    queries: torch.Tensor, database: torch.Tensor, k: int, metric: str, exclude_self: bool, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    q, x = queries.float(), database.float()
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    if exclude_self:
        valid = valid & (
            torch.arange(q.shape[0], device=q.device)[:, None] != torch.arange(x.shape[0], device=q.device)
        )
    return nearest_portable(q, x, valid, k, metric)
