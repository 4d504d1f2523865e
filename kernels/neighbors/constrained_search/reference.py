"""The k rows nearest to each query among those that its ranges name and that lie within a radius; float64."""

import torch

from planmill.kernels.neighbors.knn.reference import nearest


def constrained_search_reference(
    queries: torch.Tensor,
    database: torch.Tensor,
    query_positions: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    ranges: torch.Tensor,
    k: int,
    radius: float,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [n, k] float32 and indices [n, k] int32 as knn gives them; slot s of `positions` is row `rows[s]`."""
    q, x = queries.double(), database.double()
    within = reachable(query_positions, positions, rows, ranges, radius, x.shape[0])
    return nearest(q, x, within & q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None], k, metric)


def reachable(
    query_positions: torch.Tensor,
    positions: torch.Tensor,
    rows: torch.Tensor,
    ranges: torch.Tensor,
    radius: float,
    m: int,
) -> torch.Tensor:
    """[n, m] bool: the rows in the ranges of each query that lie within the radius."""
    slots = torch.arange(rows.shape[0], device=rows.device)
    allowed = ((slots >= ranges[:, :, :1]) & (slots < ranges[:, :, 1:])).any(1)
    square = torch.zeros(allowed.shape, dtype=torch.float64, device=rows.device)
    for own, others in zip(query_positions.unbind(1), positions.unbind(1), strict=True):
        square = square + (own[:, None] - others[None]) ** 2
    within = torch.zeros(allowed.shape[0], m, dtype=torch.bool, device=rows.device)
    return within.index_copy(1, rows.long(), allowed & (square <= radius * radius))
