"""segmented_max against a matrix product and a maximum per segment.

Error: of random queries against float64, relative to the product of the largest lengths: the larger of how far a value
is from the true maximum, and how far the row at the returned index is from reaching it.
"""

from collections.abc import Callable
from itertools import pairwise

import torch

from planmill.kernels.neighbors import maximize_by_segment

from ..cases import Case, Draw, Peer, plain

QUERIES_CHECKED = 64


def make(queries: int, segments: int, rows: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres; all segments of the same length."""

    def draw_all(draw: Draw) -> tuple:
        centers = draw.centers(64, width)
        q, x = (draw.clusters(n, width, centers=centers) for n in (queries, segments * rows))
        return q, x, torch.arange(0, segments * rows + 1, rows, device=draw.device)

    return draw_all


def product_and_max(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The n x m matrix, then one maximum per segment."""
    similarity = queries @ database.T
    best = [similarity[:, begin:end].max(1) for begin, end in pairwise(offsets.tolist())]
    indices = torch.stack([found.indices for found in best], 1) + offsets[:-1]
    return torch.stack([found.values for found in best], 1), indices


def check(args: tuple, found: tuple) -> float:
    """Random queries against the whole database in float64."""
    queries, database, offsets = args
    values, indices = found
    rows = torch.randperm(len(queries))[:QUERIES_CHECKED].to(queries.device)
    similarity = queries[rows].double() @ database.double().T
    chosen = indices[rows].long()
    if not bool(((chosen >= offsets[:-1]) & (chosen < offsets[1:])).all()):
        return torch.nan  # an index outside its segment
    true = torch.stack([similarity[:, a:b].amax(1) for a, b in pairwise(offsets.tolist())], 1)
    scale = float(queries.double().norm(dim=1).amax() * database.double().norm(dim=1).amax())
    wrong = (values[rows].double() - true).abs().max()
    return float(torch.maximum(wrong, (similarity.gather(1, chosen) - true).abs().max())) / scale


CASES = [
    Case(
        op="segmented_max",
        id="n1369-S20x1000-D768-clustered",
        make=make(1369, 20, 1000, 768),
        small=make(150, 5, 200, 768),
        ours=maximize_by_segment,
        peers={"torch.mm + max per segment": Peer(plain(product_and_max))},
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=lambda queries, database, offsets: 2.0 * len(queries) * database.numel(),
        memory=True,
    )
]
