"""constrained_search against the masked distance matrix and a k-d tree of the positions.

Error: relative to the distance, of random queries against float64: how much farther a returned row is than the true one
of its rank among those that may match, or how wrong its distance is. A row that may not match fails the check.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import GridIndex, find_constrained_neighbors

from ..cases import Case, Draw, Peer, plain

K = 4
QUERIES_CHECKED = 64

Found = tuple[torch.Tensor, torch.Tensor]


def local(queries: int, rows: int, width: int, radius: float) -> Callable[[Draw], tuple]:
    """Gaussian features anywhere in a unit square: the radius alone says how many rows a query may match."""

    def make(draw: Draw) -> tuple:
        places = (torch.rand(n, 2, generator=draw.generator, dtype=torch.float64) for n in (queries, rows))
        own, others = (x.to(draw.device) for x in places)
        return draw.normal(queries, width), draw.normal(rows, width), own, others, radius

    return make


def cameras(queries: int, rows: int, width: int, count: int) -> Callable[[Draw], tuple]:
    """Gaussian features of `count` cameras."""

    def make(draw: Draw) -> tuple:
        seen = (torch.randint(count, (n,), generator=draw.generator) for n in (queries, rows))
        own, others = (x.to(draw.device) for x in seen)
        return draw.normal(queries, width), draw.normal(rows, width), own, others, None

    return make


def ours(q: torch.Tensor, x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, radius: float | None) -> Found:
    """The function: sorting the rows by cell or camera is timed."""
    if radius is None:
        return find_constrained_neighbors(q, x, K, query_segments=own, segments=others)
    return find_constrained_neighbors(q, x, K, query_positions=own, positions=others, radius=radius)


def stored(q: torch.Tensor, x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, radius: float) -> Callable:
    """GridIndex; building it is not timed."""
    index = GridIndex(x, positions=others, radius=radius)
    return lambda: index(q, K, positions=own)


def allowed(own: torch.Tensor, others: torch.Tensor, radius: float | None) -> torch.Tensor:
    """Which pairs may match."""
    if radius is None:
        return own[:, None] == others[None]
    return torch.cdist(own, others, compute_mode="donot_use_mm_for_euclid_dist") <= radius


def masked(q: torch.Tensor, x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, radius: float | None) -> Found:
    """The n x m matrix, a mask of its size, topk."""
    distance = torch.cdist(q, x).masked_fill_(~allowed(own, others, radius), torch.inf)
    found = distance.topk(K, dim=1, largest=False)
    return found.values, torch.where(found.values == torch.inf, -1, found.indices)


def tree(q: torch.Tensor, x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, radius: float) -> Callable:
    """scikit-learn's KDTree of the positions, then each query against the rows it found; building is not timed."""
    from sklearn.neighbors import KDTree

    positions = KDTree(others.numpy())

    def search() -> Found:
        values, indices = torch.full((len(q), K), torch.inf), torch.full((len(q), K), -1)
        for i, rows in enumerate(positions.query_radius(own.numpy(), radius)):
            near = torch.from_numpy(rows)
            distance = (x[near] - q[i]).square_().sum(1).sqrt_()
            best = distance.topk(min(K, len(near)), largest=False)
            values[i, : len(best.values)], indices[i, : len(best.values)] = best.values, near[best.indices]
        return values, indices

    return search


def check(args: tuple, found: Found) -> float:
    """Random queries against all rows in float64, by expanded squares."""
    queries, database, own, others, radius = args
    rows = torch.randperm(len(queries))[:QUERIES_CHECKED].to(queries.device)
    distances, indices = found[0][rows].double(), found[1][rows].long()
    q, x = queries[rows].double(), database.double()
    squared = (q * q).sum(1)[:, None] + (x * x).sum(1)[None] - 2 * q @ x.T
    squared = torch.where(allowed(own[rows], others, radius), squared.clamp_min(0), torch.inf)
    true = squared.topk(K, dim=1, largest=False).values.sqrt()
    nothing = true == torch.inf
    if not torch.equal(indices < 0, nothing) or bool((distances[nothing] != torch.inf).any()):
        return torch.nan
    reached = squared.gather(1, indices.clamp_min(0)).sqrt()[~nothing]  # infinite where a row may not match
    scale = true[~nothing]
    return float(torch.maximum((reached - scale).abs() / scale, (distances[~nothing] - reached).abs() / scale).max())


def flops(q: torch.Tensor, x: torch.Tensor, own: torch.Tensor, others: torch.Tensor, radius: float | None) -> float:
    """One inner product per pair that may match, as a sample of the queries has it."""
    share = float(allowed(own[:64], others, radius).double().mean())
    return 2.0 * share * len(q) * len(x) * q.shape[1]


MASKED = Peer(plain(masked), tolerance=1e-4)
NEAR = {
    "torch.cdist + mask + topk": MASKED,
    "scikit-learn KDTree, then each query": Peer(tree, package="sklearn", devices=("cpu",), tolerance=1e-4),
    "GridIndex, stored": Peer(stored, yardstick=True),
}
SHARED: dict[str, Any] = {
    "op": "constrained_search",
    "ours": ours,
    "check": check,
    "tolerance": {torch.float32: 2e-6},
    "flops": flops,
}

CASES = [
    Case(
        id="n1000-m50000-D128-radius0.05",
        make=local(1000, 50000, 128, 0.05),
        small=local(50, 2000, 128, 0.2),
        peers=NEAR,
        memory=True,
        **SHARED,
    ),
    Case(
        id="n1000-m20000-D512-radius0.7",
        make=local(1000, 20000, 512, 0.7),
        small=local(50, 2000, 64, 0.7),
        peers=NEAR,
        **SHARED,
    ),
    Case(
        id="n1000-m50000-D256-cameras20",
        make=cameras(1000, 50000, 256, 20),
        small=cameras(100, 2000, 64, 3),
        peers={"torch.cdist + mask + topk": MASKED},
        **SHARED,
    ),
]
