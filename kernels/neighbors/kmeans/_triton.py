"""k-means on the GPU: segmented_min with one segment, sums in float64. Each round asks the device whether to go on."""

import torch

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.neighbors.segmented_min import _triton as segmented_min

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


def launch(
    features: torch.Tensor, centers: torch.Tensor, iterations: int, least: float, relocating: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres [K, D] float32, distances [n] float32 to them, labels [n] int32, rounds [1] int32: as the reference."""
    clusters = len(centers)
    bounds = clusters * torch.arange(2, dtype=torch.int32, device=centers.device)

    def assign() -> tuple[torch.Tensor, torch.Tensor]:
        distances, labels = segmented_min.launch(features, centers, bounds)
        return distances[:, 0], labels[:, 0]

    before, settled, done = torch.full(features.shape[:1], -1, device=features.device), False, 0
    while done < iterations and not settled:
        distances, codes = assign()
        labels = codes.long()
        sums, counts = sum_clusters(features, labels, clusters)
        if relocating:
            relocate(features, labels, distances, sums, counts)
        moved = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centers.double()).float()
        shift = float((moved.double() - centers.double()).square().sum())
        settled = shift <= least or torch.equal(labels, before)
        centers, before, done = moved, labels, done + 1
    distances, codes = assign()
    rounds = torch.tensor([done], dtype=torch.int32, device=features.device)
    return centers, distances.contiguous(), codes.contiguous(), rounds


STATIC: list[StaticKernel] = []  # the kernels stand in kernels/common/triton_search.py
