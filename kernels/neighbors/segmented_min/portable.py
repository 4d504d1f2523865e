"""Every row goes to the minimum of its segment, screened by products; the winners are measured by differences.

Of two rows that are closer to each other than float32 products can tell, the other one may win.
"""

import torch

from planmill.kernels.neighbors.knn.portable import distances, scale_of, screened


def segmented_min_portable(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    q, x = queries.float(), database.float()
    segments, rows = offsets.shape[0] - 1, x.shape[0]
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    q, x = (torch.where(t.isfinite(), t, 0) for t in (q, x))
    scale = scale_of(q, x)
    q, x = q / scale, x / scale
    score = screened(q, x, valid)
    position = torch.arange(rows, device=x.device)
    segment = (position[:, None] >= offsets[None, 1:]).sum(1)  # of each row, ascending
    at = segment[None].expand_as(score)
    best = score.new_full((q.shape[0], segments), torch.inf).scatter_reduce(1, at, score, "amin")
    first = torch.where((score == best.gather(1, at)) & (score < torch.inf), position, rows)
    indices = first.new_full((q.shape[0], segments), rows).scatter_reduce(1, at, first, "amin")
    measured = distances(q, x[indices.clamp_max(rows - 1)]) * scale
    return torch.where(indices == rows, torch.inf, measured), torch.where(indices == rows, -1, indices).int()
