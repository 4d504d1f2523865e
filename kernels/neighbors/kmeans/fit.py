"""Lloyd's iteration: assignment by segmented_min, means in float64."""

import torch

from planmill.kernels.common.checks import check_choice, check_float, check_rank
from planmill.kernels.neighbors.code_assignment import measure_codes
from planmill.kernels.neighbors.kmeans.result import KMeansResult
from planmill.kernels.neighbors.kmeans.start import draw_rows, spread_rows

OP = "kmeans"
STARTS = {"k-means++": spread_rows, "random": draw_rows}
POLICIES = ("relocate", "keep")
ROWS_SUMMED = 16384  # rows widened to float64 at a time


def sum_clusters(features: torch.Tensor, labels: torch.Tensor, clusters: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums [K, D] and counts [K] of the rows of each cluster, float64."""
    sums = torch.zeros(clusters, features.shape[1], dtype=torch.float64, device=features.device)
    for first in range(0, features.shape[0], ROWS_SUMMED):
        rows = slice(first, first + ROWS_SUMMED)
        sums.index_add_(0, labels[rows], features[rows].double())
    return sums, torch.bincount(labels, minlength=clusters).double()


def relocate(
    features: torch.Tensor, labels: torch.Tensor, distances: torch.Tensor, sums: torch.Tensor, counts: torch.Tensor
) -> None:
    """Give each empty cluster one row, those farthest from their centres first; the rows leave their clusters."""
    empty = (counts == 0).nonzero()[:, 0]
    if len(empty) == 0 or not bool(distances.amax() > 0):  # every row is a centre: nothing to gain
        return
    far = distances.argsort(descending=True, stable=True)[: len(empty)]
    empty = empty[: len(far)]
    rows = features[far].double()
    sums.index_add_(0, labels[far], -rows)
    counts.index_add_(0, labels[far], -torch.ones_like(distances[far], dtype=torch.float64))
    sums[empty], counts[empty] = rows, 1.0


def first_centers(features: torch.Tensor, clusters: int, start: str | torch.Tensor, seed: int) -> torch.Tensor:
    """The centres [K, D] float32 before the first iteration."""
    if isinstance(start, torch.Tensor):
        if list(start.shape) != [clusters, features.shape[1]]:
            raise ValueError(f"{OP}: start must be {[clusters, features.shape[1]]}, got {list(start.shape)}")
        if not bool(start.isfinite().all()):
            raise ValueError(f"{OP}: start holds NaN or infinity")
        return start.detach().float().to(features.device)
    check_choice(OP, "start", start, tuple(STARTS))
    return features[STARTS[start](features, clusters, torch.Generator().manual_seed(seed))]


@torch.no_grad()
def fit_kmeans(
    features: torch.Tensor,
    clusters: int,
    *,
    start: str | torch.Tensor = "k-means++",
    empty: str = "relocate",
    iterations: int = 300,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> KMeansResult:
    """Centres that minimise the sum of squared distances, by Lloyd's iteration from one start.

    `labels_i = argmin_j |x_i - c_j|`, `c_j = mean of x_i with labels_i = j`, until no label changes, or the squared
    distance that all centres moved is at most `tolerance` times the mean variance of the channels. Distances are those
    of float32 differences, means are sums in float64: data far from the origin loses nothing.

    Args:
        features: [n, D], float32, bfloat16 or float16, any strides; read as float32.
        clusters: K, 1 to n.
        start: "k-means++" (each row by its squared distance from those chosen, the best of 2 + floor(ln K) draws),
            "random" (distinct rows), or the first centres [K, D].
        empty: what a cluster without rows becomes: "relocate", the row farthest from its centre, which leaves its own
            cluster (as scikit-learn does); "keep", where it was (as anomalib does). A cluster whose last row was
            relocated stays where it was.
        iterations: at most; at least 1.
        tolerance: 0: until no label changes.
        seed: of the start.

    Returns:
        A KMeansResult whose labels are those of its centres, ties to the lower index.

    Raises:
        ValueError: wrong shapes, K outside 1 to n, a row that holds NaN or infinity, an unknown start or policy,
            iterations below 1, a negative tolerance.
        TypeError: another dtype.

    Source: Lloyd, "Least squares quantization in PCM", 1982; Arthur, Vassilvitskii, "k-means++", SODA 2007.
    """
    check_rank(OP, "features", features, 2, "[n, D]")
    check_float(OP, "features", features)
    check_choice(OP, "empty", empty, POLICIES)
    if not 1 <= clusters <= features.shape[0]:
        raise ValueError(f"{OP}: clusters must be from 1 to the number of rows {features.shape[0]}, got {clusters}")
    if iterations < 1 or not tolerance >= 0:
        raise ValueError(
            f"{OP}: needs iterations of at least 1 and a tolerance from 0, got {iterations} and {tolerance}"
        )
    x = features.float()
    if not bool(x.isfinite().all()):
        row = int(x.isfinite().all(1).int().argmin())
        raise ValueError(f"{OP}: features hold NaN or infinity in row {row}")
    centers = first_centers(x, clusters, start, seed)
    least = tolerance * float(x.var(0, correction=0).double().mean()) if tolerance > 0 else 0.0
    before, settled = torch.full(x.shape[:1], -1, device=x.device), False
    done = 0
    while done < iterations and not settled:
        distances, codes = measure_codes(x, centers)
        labels = codes.long()
        sums, counts = sum_clusters(x, labels, clusters)
        if empty == "relocate":
            relocate(x, labels, distances, sums, counts)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centers.double()).float()
        shift = float((moved.double() - centers.double()).square().sum())
        settled = shift <= least or torch.equal(labels, before)
        centers, before, done = moved, labels, done + 1
    distances, codes = measure_codes(x, centers)
    return KMeansResult(centers, codes, float(distances.double().square().sum()), done)
