"""Lloyd's iteration: assignment to the nearest centre, centres to the means, in float64."""

import torch


def kmeans_reference(
    features: torch.Tensor, centers: torch.Tensor, iterations: int, least: float, relocate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Centres [K, D] float32, distances [n] float32 to them, labels [n] int32, rounds [1] int32."""
    x, c = features.double(), centers.double()

    def assign() -> tuple[torch.Tensor, torch.Tensor]:
        distances = torch.cdist(x, c, compute_mode="donot_use_mm_for_euclid_dist")
        labels = distances.argmin(1)  # the lowest index on ties
        return distances.gather(1, labels[:, None])[:, 0], labels

    before, settled, done = torch.full(x.shape[:1], -1, device=x.device), False, 0
    while done < iterations and not settled:
        distances, labels = assign()
        sums = torch.zeros_like(c).index_add_(0, labels, x)
        counts = torch.bincount(labels, minlength=len(c)).double()
        empty = (counts == 0).nonzero()[:, 0]
        if relocate and bool(distances.amax() > 0):
            far = distances.argsort(descending=True, stable=True)[: len(empty)]
            sums.index_add_(0, labels[far], -x[far])
            counts.index_add_(0, labels[far], -torch.ones_like(distances[far]))
            sums[empty[: len(far)]], counts[empty[: len(far)]] = x[far], 1.0
        means = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], c)
        moved = means.float().double()  # centres are float32 numbers
        settled = float((moved - c).square().sum()) <= least or torch.equal(labels, before)
        c, before, done = moved, labels, done + 1
    distances, labels = assign()
    return c.float(), distances.float(), labels.int(), torch.tensor([done], dtype=torch.int32, device=x.device)
