"""MSM: how far each patch is from its nearest patch in every other image, averaged over the nearest images; float64."""

import torch


def interval(low: float, high: float, count: int) -> tuple[int, int]:
    """First and last-plus-one of the sorted distances to average; fractions of `count` below 1, counts from 1 on."""
    begin = int(low * count) if low < 1 else min(int(low), count)
    end = int(high * count) if high < 1 else min(int(high), count)
    begin, end = min(begin, end), max(begin, end)
    end = max(end, 1)  # at least one reference image is kept: no NaN for small N
    return min(begin, end - 1), end


def nearby(patches: int, radius: float, width: int, device: torch.device) -> torch.Tensor:
    """[P, P] bool: patches of the grid whose centres are at most `radius` patch widths apart; all when radius < 0."""
    index = torch.arange(patches, device=device)
    y, x = index // width, index % width
    squared = (y[:, None] - y[None]) ** 2 + (x[:, None] - x[None]) ** 2
    return squared <= radius * radius if radius >= 0 else torch.ones_like(squared, dtype=torch.bool)


def patch_to_image(z: torch.Tensor, other: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """a_p = min over q of |z_p - other_q| for patches p of one image and q of another; [P]."""
    valid = z.isfinite().all(1)[:, None] & other.isfinite().all(1)[None] & near
    distance = torch.cdist(
        z.nan_to_num(0, 0, 0), other.nan_to_num(0, 0, 0), compute_mode="donot_use_mm_for_euclid_dist"
    )
    return torch.where(valid, distance, torch.inf).amin(1)


def mutual_score_reference(
    features: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool
) -> torch.Tensor:
    """Scores [N, P] float32."""
    z = features.double()
    near = nearby(z.shape[1], radius, width, z.device)
    begin, end = interval(low, high, len(z) - 1)
    scores = []
    for i in range(len(z)):
        a = torch.stack([patch_to_image(z[i], z[j], near) for j in range(len(z)) if j != i], 1)
        scores.append(a.sort(1).values[:, begin:end].mean(1))
    return torch.stack(scores).float()
