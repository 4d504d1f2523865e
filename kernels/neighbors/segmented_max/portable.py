"""Every row of the database goes to the maximum of its segment: no size depends on the offsets."""

import torch


def segmented_max_portable(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    q, x = queries.float(), database.float()
    segments, rows = offsets.shape[0] - 1, x.shape[0]
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    q, x = (torch.where(t.isfinite(), t, 0) for t in (q, x))
    similarity = torch.where(valid, q @ x.T, -torch.inf)
    position = torch.arange(rows, device=x.device)
    segment = (position[:, None] >= offsets[None, 1:]).sum(1)  # of each row, ascending
    at = segment[None].expand_as(similarity)
    values = similarity.new_full((q.shape[0], segments), -torch.inf).scatter_reduce(1, at, similarity, "amax")
    first = torch.where((similarity == values.gather(1, at)) & (similarity > -torch.inf), position, rows)
    indices = first.new_full((q.shape[0], segments), rows).scatter_reduce(1, at, first, "amin")
    return values, torch.where(indices == rows, -1, indices).int()
