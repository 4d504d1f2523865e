"""As knn without plugins: screened by products, measured by differences."""

import torch

from planmill.kernels.neighbors.constrained_search.reference import reachable
from planmill.kernels.neighbors.knn.portable import nearest_portable


def constrained_search_portable(
    queries: torch.Tensor, database: torch.Tensor, query_positions: torch.Tensor, positions: torch.Tensor,
    rows: torch.Tensor, ranges: torch.Tensor, k: int, radius: float, metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See the reference; in float32."""
    q, x = queries.float(), database.float()
    within = reachable(query_positions, positions, rows, ranges, radius, x.shape[0])
    return nearest_portable(q, x, within & q.isfinite().all(1)[:, None] & x.isfinite().all(1), k, metric)
