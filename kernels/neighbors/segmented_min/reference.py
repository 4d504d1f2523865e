"""d[q, s] = min over x in segment s of |q - x|, in float64."""

from itertools import pairwise

import torch

from planmill.kernels.neighbors.knn.reference import knn_reference


def segmented_min_reference(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [n, S] float32 and indices [n, S] int32 into the database; inf and -1 for a segment without a match."""
    distances, indices = [queries.new_empty(len(queries), 0).float()], [offsets.new_empty(len(queries), 0).int()]
    for begin, end in pairwise(offsets.tolist()):
        distance, index = knn_reference(queries, database[begin:end], 1, "l2", False, True)
        distances.append(distance)
        indices.append(torch.where(index < 0, -1, index + begin))
    return torch.cat(distances, 1), torch.cat(indices, 1)
