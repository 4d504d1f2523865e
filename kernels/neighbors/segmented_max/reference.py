"""M[q, s] = max over x in segment s of q . x, in float64."""

from itertools import pairwise

import torch


def segmented_max_reference(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [n, S] float32 and indices [n, S] int32 into the database; -inf and -1 for a segment without a match."""
    q, x = queries.double(), database.double()
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    similarity = torch.where(valid, q.nan_to_num(0, 0, 0) @ x.nan_to_num(0, 0, 0).T, -torch.inf)
    bounds = offsets.tolist()
    values, indices = [], []
    for begin, end in pairwise(bounds):
        if begin == end:
            values.append(q.new_full((len(q),), -torch.inf))
            indices.append(torch.full((len(q),), -1, device=q.device))
            continue
        block = similarity[:, begin:end]
        best = block.detach().argmax(1)  # the lower index on ties
        value = block.gather(1, best[:, None])[:, 0]
        values.append(value)
        indices.append(torch.where(value.detach() == -torch.inf, -1, best + begin))
    if not values:
        return q.new_empty(len(q), 0).float(), torch.empty(len(q), 0, dtype=torch.int32, device=q.device)
    return torch.stack(values, 1).float(), torch.stack(indices, 1).int()
