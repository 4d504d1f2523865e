"""segmented_min against the distance matrix and a minimum per segment, as CANN needs it."""

from itertools import pairwise

import torch

from planmill.kernels.neighbors import minimize_by_segment

from ..cases import Case, Peer, plain
from .segmented_max import make

QUERIES_CHECKED = 64


def distances_and_min(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The n x m matrix, then one minimum per segment."""
    distances = torch.cdist(queries, database)
    best = [distances[:, begin:end].min(1) for begin, end in pairwise(offsets.tolist())]
    indices = torch.stack([found.indices for found in best], 1) + offsets[:-1]
    return torch.stack([found.values for found in best], 1), indices


def check(args: tuple, found: tuple) -> float:
    """Random queries against the whole database in float64."""
    queries, database, offsets = args
    distances, indices = found
    rows = torch.randperm(len(queries))[:QUERIES_CHECKED].to(queries.device)
    matrix = torch.cdist(queries[rows].double(), database.double(), compute_mode="donot_use_mm_for_euclid_dist")
    chosen = indices[rows].long()
    if not bool(((chosen >= offsets[:-1]) & (chosen < offsets[1:])).all()):
        return torch.nan  # an index outside its segment
    true = torch.stack([matrix[:, a:b].amin(1) for a, b in pairwise(offsets.tolist())], 1)
    wrong = (distances[rows].double() - true).abs().max()
    return float(torch.maximum(wrong, (matrix.gather(1, chosen) - true).abs().max()) / matrix.max())


CASES = [
    Case(
        op="segmented_min",
        id="n1000-S50x1000-D128-clustered",
        make=make(1000, 50, 1000, 128),
        small=make(150, 5, 200, 128),
        ours=minimize_by_segment,
        peers={"torch.cdist + min per segment": Peer(plain(distances_and_min))},
        check=check,
        tolerance={torch.float32: 3e-4},  # the peer's products lose digits
        flops=lambda queries, database, offsets: 2.0 * len(queries) * database.numel(),
        memory=True,
    )
]
