"""knn against FAISS flat, scikit-learn brute force and cdist + topk.

Error: relative to the distance, of random queries against float64: the larger of how much farther a returned row is
than the true one of its rank (0: the same neighbours), and how wrong its returned distance is. Ours passes at 2e-6:
another neighbour is accepted only where the two distances are a tie in float32.
"""

from collections.abc import Callable
from typing import Any

import numpy
import torch

from planmill.kernels.neighbors import find_neighbors

from ..cases import Case, Draw, Goal, Peer, plain

K = 9
QUERIES_CHECKED = 64


def gaussian(queries: int, rows: int, width: int, k: int = K) -> Callable[[Draw], tuple]:
    """Gaussian values: all distances nearly equal, the hardest to screen."""
    return lambda draw: (draw.normal(queries, width), draw.normal(rows, width), k)


def clustered(queries: int, rows: int, width: int, k: int = K) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres, as patch features are."""

    def make(draw: Draw) -> tuple:
        centers = draw.centers(64, width)
        return *(draw.clusters(n, width, centers=centers) for n in (queries, rows)), k

    return make


def faiss_flat(queries: torch.Tensor, database: torch.Tensor, k: int) -> Callable[[], Any]:
    """IndexFlatL2; adding the database to the index is not timed."""
    import faiss

    index = faiss.IndexFlatL2(database.shape[1])
    index.add(database.float().numpy())
    array = queries.float().numpy()
    return lambda: index.search(array, k)


def sklearn_brute(queries: torch.Tensor, database: torch.Tensor, k: int) -> Callable[[], Any]:
    """NearestNeighbors, brute force, all cores; `fit` is not timed."""
    from sklearn.neighbors import NearestNeighbors

    model = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(database.float().numpy())
    array = queries.float().numpy()
    return lambda: model.kneighbors(array)


def cdist_topk(queries: torch.Tensor, database: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The n x m matrix, then topk."""
    found = torch.cdist(queries, database).topk(k, dim=1, largest=False)
    return found.values, found.indices


def _roots(found: tuple[numpy.ndarray, numpy.ndarray]) -> tuple[numpy.ndarray, numpy.ndarray]:
    return numpy.sqrt(numpy.maximum(found[0], 0)), found[1]


def check(args: tuple, found: tuple) -> float:
    """Random queries against the whole database in float64 (expanded squares: exact to 1e-13 of the squared length)."""
    queries, database, k = args
    distances, indices = (torch.as_tensor(x, device=queries.device) for x in found)
    if tuple(indices.shape) != (len(queries), k) or not bool(((indices >= 0) & (indices < len(database))).all()):
        return torch.nan
    rows = torch.randperm(len(queries))[:QUERIES_CHECKED].to(queries.device)
    q, x = queries[rows].double(), database.double()
    squared = (q * q).sum(1)[:, None] + (x * x).sum(1)[None] - 2 * q @ x.T
    chosen = indices[rows].long()
    if bool((chosen.sort(1).values.diff(dim=1) == 0).any()):
        return torch.nan  # a row was returned twice
    true = squared.topk(k, dim=1, largest=False).values.clamp_min(0).sqrt()
    reached = squared.gather(1, chosen).clamp_min(0).sqrt()
    scale = true.clamp_min(torch.finfo(torch.float64).tiny)
    gap, wrong = (reached - true).abs() / scale, (distances[rows].double() - reached).abs() / scale
    return float(torch.maximum(gap, wrong).max())


def flops(queries: torch.Tensor, database: torch.Tensor, k: int) -> float:
    """One inner product per query and row."""
    return 2.0 * len(queries) * len(database) * queries.shape[1]


FAISS = "FAISS IndexFlatL2"
PEERS = {
    FAISS: Peer(faiss_flat, _roots, package="faiss", devices=("cpu",), tolerance=1e-4),
    "scikit-learn brute": Peer(sklearn_brute, package="sklearn", devices=("cpu",), tolerance=1e-4),
    "torch.cdist + topk": Peer(plain(cdist_topk), tolerance=1e-4),
}
GOALS = (
    Goal("ratio", 3, FAISS, needs="amx"),
    Goal("ratio", 1.2, FAISS, needs="no amx"),
    Goal("memory", 64 << 20),
)
SHARED: dict[str, Any] = {
    "op": "knn",
    "ours": find_neighbors,
    "peers": PEERS,
    "check": check,
    "tolerance": {torch.float32: 2e-6},
    "flops": flops,
}

CASES = [
    *(
        Case(
            id=f"n1369-m20000-D1024-k9-{name}",
            make=kind(1369, 20000, 1024),
            small=kind(150, 2000, 1024),
            goals=GOALS,
            memory=True,
            **SHARED,
        )
        for name, kind in (("clustered", clustered), ("gaussian", gaussian))
    ),
    *(
        Case(
            id=f"scaling-n256-m{rows}-D384-k9",
            make=clustered(256, rows, 384),
            sweep=("rows of the database", rows),
            **SHARED,
        )
        for rows in (1000, 4000, 16000, 64000)
    ),
]
