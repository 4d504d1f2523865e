"""All pairs of images at once: nearest patches are found by products and measured by differences.

A patch whose two nearest are closer to each other than float32 products can tell may be measured against the second.
"""

from fractions import Fraction

import torch

from planmill.kernels.neighbors.knn.portable import scale_of
from planmill.kernels.neighbors.mutual_score.reference import interval, nearby

BITS = 30  # of a fraction of a count
CHECKED = 1024  # counts up to here are what Python's double arithmetic gives, to the last one


def patch_to_images(z: torch.Tensor, others: torch.Tensor, near: torch.Tensor) -> torch.Tensor:
    """a [N, M, P]: how far each patch of z [N, P, C] is from its nearest patch in each of `others` [M, P, C]."""
    count, patches, channels = others.shape
    valid = z.isfinite().all(2)[:, None, :, None] & others.isfinite().all(2)[None, :, None] & near
    z, others = (torch.where(t.isfinite(), t, 0) for t in (z, others))
    scale = scale_of(z, others)
    z, others = z / scale, others / scale
    mean = others.mean((0, 1))  # products of centred patches cancel less
    a, b = z - mean, others - mean
    squares = b.square().sum(2)[None, :, None] - 2 * a[:, None] @ b.mT[None]  # + |a|^2, which changes no order
    best = torch.where(valid, squares, torch.inf).argmin(3)  # [N, M, P]
    row = best + patches * torch.arange(count, device=z.device)[:, None]
    distance = (z[:, None] - others.reshape(count * patches, channels)[row]).square().sum(3).sqrt() * scale
    return torch.where(valid.any(3), distance, torch.inf)


def mean_between(a: torch.Tensor, low: float, high: float, count: int) -> torch.Tensor:
    """The mean of the sorted a [N, M, P] over the places of `interval(low, high, count)`: [N, P]."""
    ordered = a.sort(1).values
    if isinstance(count, int):
        begin, end = interval(low, high, count)
        return ordered[:, begin:end].mean(1)
    n = torch.full((), count, dtype=torch.int64, device=a.device)
    first, second = _place(low, n), _place(high, n)
    last = torch.maximum(first, second).clamp_min(1)
    first = torch.minimum(torch.minimum(first, second), last - 1)
    place = torch.arange(a.shape[1], device=a.device)
    inside = ((place >= first) & (place < last))[:, None]
    return torch.where(inside, ordered, 0).sum(1) / (last - first).float()


def _place(value: float, count: torch.Tensor) -> torch.Tensor:
    """int(value * count) below 1, else min(value, count), of a count that is known only at run time."""
    if value >= 1:
        return count.clamp_max(int(value))
    factor = -int(-Fraction(value) * 2**BITS // 1)  # rounded up
    place = (count * factor) // 2**BITS
    for n in range(1, CHECKED + 1):
        if (wrong := (n * factor >> BITS) - int(value * n)) != 0:
            place = place - wrong * (count == n)
    return place


def mutual_score_portable(
    features: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool
) -> torch.Tensor:
    """See the reference; in float32."""
    z = features.float()
    a = patch_to_images(z, z, nearby(z.shape[1], radius, width, z.device))
    index = torch.arange(z.shape[0], device=z.device)
    itself = (index[:, None] == index)[..., None]
    return mean_between(torch.where(itself, torch.inf, a), low, high, z.shape[0] - 1)
