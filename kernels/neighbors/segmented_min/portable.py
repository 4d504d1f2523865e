"""The nearest row of each segment, screened by products; the winners are measured by differences.

Of two rows that are closer to each other than float32 products can tell, the other one may win.
"""

import torch

from planmill.kernels.neighbors.knn.portable import distances, scale_of, screened
from planmill.kernels.neighbors.segmented_max.portable import best_by_segment


def segmented_min_portable(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    q, x = queries.float(), database.float()
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    q, x = (torch.where(t.isfinite(), t, 0) for t in (q, x))
    scale = scale_of(q, x)
    q, x = q / scale, x / scale
    score, rows = best_by_segment(-screened(q, x, valid), offsets)
    measured = distances(q, x[rows]) * scale
    none = score == -torch.inf
    return torch.where(none, torch.inf, measured), torch.where(none, -1, rows)
