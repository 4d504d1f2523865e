"""Mutual nearest neighbours under S = w1^2 cos(a1, b1) + w2^2 cos(a2, b2), in float64."""

import torch


def direct(x: torch.Tensor, weight: float) -> torch.Tensor:
    """Rows of length `weight`; NaN where a row has no direction: it is zero, or holds NaN or infinity."""
    has_direction = x.isfinite().all(-1, keepdim=True) & (x != 0).any(-1, keepdim=True)
    x = torch.where(has_direction, x.double(), 1)
    return torch.where(has_direction, x * (weight * (x * x).sum(-1, keepdim=True).rsqrt()), torch.nan)


def fuse(x: torch.Tensor, x2: torch.Tensor, weight: float, weight2: float) -> torch.Tensor:
    """Both features side by side, [B, N, D1 + D2]; D2 = 0: the first alone."""
    return torch.cat([direct(x, weight), direct(x2, weight2)], -1)


def mutual_matching_reference(
    a: torch.Tensor, b: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor, weight: float, weight2: float, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores [B, n] float32, nearest [B, n], nearest_back [B, m] and indices [B, n] int32."""
    z_a, z_b = fuse(a, a2, weight, weight2), fuse(b, b2, weight, weight2)
    usable = ~z_a.isnan().any(2)[:, :, None] & ~z_b.isnan().any(2)[:, None]
    s = torch.where(usable, z_a.nan_to_num() @ z_b.nan_to_num().mT, -torch.inf)  # S [B, n, m]
    floor = torch.nn.functional.pad(s, (0, 1, 0, 1), value=-torch.inf)  # a row and a column that nothing beats
    lowest = 2.0 * (weight**2 + (weight2**2 if a2.shape[-1] else 0.0))
    found, distances = [], []
    for matrix in (floor[:, :-1], floor.mT[:, :-1]):
        best = matrix.detach().argmax(2)  # the lowest index on ties
        value = matrix.gather(2, best[..., None])[..., 0]
        others = matrix.detach().scatter(2, best[..., None], -torch.inf).amax(2)
        first, second = ((lowest - 2 * v.detach()).clamp_min(0).sqrt() for v in (value, others))
        found.append((value, torch.where(value.detach() == -torch.inf, -1, best)))
        distances.append(first <= ratio * second)
    (scores, nearest), (_, back) = found
    there = nearest.clamp_min(0)
    own = torch.arange(s.shape[1], device=s.device)
    padded_back, clear = (torch.nn.functional.pad(x, (0, 1), value=-1) for x in (back, distances[1].long()))
    mutual = (nearest >= 0) & (padded_back.gather(1, there) == own) & distances[0] & (clear.gather(1, there) > 0)
    return scores.float(), nearest.int(), back.int(), torch.where(mutual, nearest, -1).int()
