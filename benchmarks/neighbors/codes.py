"""Assignment to the nearest code, and k-means, against what users run: torch.cdist + argmin, FAISS, scikit-learn.

Error of an assignment: by how much a chosen code is farther than the nearest one, relative to the distance, in float64.
Of k-means: the inertia above that of the same number of iterations in float64, relative.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import KMeansResult, assign_codes, fit_kmeans

from ..cases import Case, Draw, Peer, plain

ROUNDS = 10


def make(rows: int, codes: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around the codes, as tokens of a codebook that was fitted to them are."""

    def draw_all(draw: Draw) -> tuple:
        centers = draw.centers(codes, width)
        return draw.clusters(rows, width, centers=centers), draw.clusters(codes, width, centers=centers)

    return draw_all


def cdist_argmin(features: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The n x K matrix, then argmin."""
    return torch.cdist(features, codes).argmin(1)


def faiss_assign(features: torch.Tensor, codes: torch.Tensor) -> Callable[[], Any]:
    """IndexFlatL2 and k = 1; adding the codes to the index is not timed."""
    import faiss

    index = faiss.IndexFlatL2(codes.shape[1])
    index.add(codes.numpy())
    array = features.numpy()
    return lambda: index.search(array, 1)[1][:, 0]


def sklearn_assign(features: torch.Tensor, codes: torch.Tensor) -> Callable[[], Any]:
    """pairwise_distances_argmin, which is blocked and runs on all cores."""
    from sklearn.metrics import pairwise_distances_argmin

    x, e = features.numpy(), codes.numpy()
    return lambda: pairwise_distances_argmin(x, e)


def check_codes(args: tuple, found: Any) -> float:
    """All rows in float64 (expanded squares: exact to 1e-13 of the squared length)."""
    features, codes = (t.double() for t in args)
    chosen = torch.as_tensor(found, device=features.device).long()
    if chosen.shape != features.shape[:1] or not bool(((chosen >= 0) & (chosen < len(codes))).all()):
        return torch.nan
    squared = (features * features).sum(1)[:, None] + (codes * codes).sum(1)[None] - 2 * features @ codes.T
    squared = squared.clamp_min(0).sqrt()
    true, reached = squared.amin(1), squared.gather(1, chosen[:, None])[:, 0]
    return float(((reached - true) / true.clamp_min(1e-30)).max())


def lloyd(features: torch.Tensor, start: torch.Tensor) -> KMeansResult:
    """Ours; a fixed number of rounds from given centres."""
    return fit_kmeans(features, len(start), start=start, iterations=ROUNDS, tolerance=0, empty="keep")


def sklearn_lloyd(features: torch.Tensor, start: torch.Tensor) -> Callable[[], Any]:
    """KMeans(algorithm="lloyd")."""
    from sklearn.cluster import KMeans

    x, centers = features.numpy(), start.numpy()
    model = KMeans(len(centers), init=centers, n_init=1, algorithm="lloyd", max_iter=ROUNDS, tol=0)
    return lambda: torch.from_numpy(model.fit(x).cluster_centers_)


def faiss_lloyd(features: torch.Tensor, start: torch.Tensor) -> Callable[[], Any]:
    """faiss.Kmeans with all rows."""
    import faiss

    x, centers = features.numpy(), start.numpy()

    def run() -> torch.Tensor:
        model = faiss.Kmeans(x.shape[1], len(centers), niter=ROUNDS, max_points_per_centroid=len(x))
        model.train(x, init_centroids=centers)
        return torch.from_numpy(model.centroids)

    return run


def inertia(x: torch.Tensor, centers: torch.Tensor) -> float:
    """Sum of the squared distances to the nearest centre, in float64."""
    squared = (x * x).sum(1)[:, None] + (centers * centers).sum(1)[None] - 2 * x @ centers.T
    return float(squared.amin(1).clamp_min(0).sum())


def check_centers(args: tuple, found: Any) -> float:
    """Inertia above that of Lloyd's iteration in float64."""
    x, centers = (t.double() for t in args)
    for _ in range(ROUNDS):
        labels = ((centers * centers).sum(1)[None] - 2 * x @ centers.T).argmin(1)
        counts = torch.bincount(labels, minlength=len(centers)).double()
        sums = torch.zeros_like(centers).index_add_(0, labels, x)
        centers = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centers)
    got = found.centers if isinstance(found, KMeansResult) else found
    return max(inertia(x, got.double()) / inertia(x, centers) - 1, 0.0)


def flops(features: torch.Tensor, codes: torch.Tensor) -> float:
    """One inner product per row and code."""
    return 2.0 * features.numel() * len(codes)


ASSIGNERS = {
    "torch.cdist + argmin": Peer(plain(cdist_argmin), tolerance=1e-4),
    "FAISS IndexFlatL2": Peer(faiss_assign, package="faiss", devices=("cpu",), tolerance=1e-4),
    "scikit-learn pairwise_distances_argmin": Peer(sklearn_assign, package="sklearn", devices=("cpu",), tolerance=1e-4),
}
FITTERS = {
    "scikit-learn KMeans": Peer(sklearn_lloyd, package="sklearn", devices=("cpu",), tolerance=1e-3),
    "faiss.Kmeans": Peer(faiss_lloyd, package="faiss", devices=("cpu",), tolerance=1e-2),
}

CASES = [
    *(
        Case(
            op="segmented_min",
            id=f"assign_codes-n{rows}-K{codes}-D{width}",
            make=make(rows, codes, width),
            small=make(rows // 10, max(codes // 10, 8), width),
            ours=assign_codes,
            peers=ASSIGNERS,
            check=check_codes,
            tolerance={torch.float32: 2e-6},
            flops=flops,
            memory=codes == 8192,
        )
        for rows, codes, width in ((10000, 8192, 32), (10000, 1024, 384), (20000, 64, 64))
    ),
    Case(
        op="kmeans",
        id="fit_kmeans-n20000-K256-D128-10-rounds",
        make=make(20000, 256, 128),
        small=make(2000, 32, 128),
        ours=lloyd,
        peers=FITTERS,
        check=check_centers,
        tolerance={torch.float32: 1e-4},
    ),
]
