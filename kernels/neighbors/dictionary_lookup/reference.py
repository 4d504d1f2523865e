"""Weights of atoms on the simplex, most of them zero: sparsemax or 1.5-entmax of scaled inner products, by sorting."""

import torch

POWERS = {"sparsemax": 1, "entmax15": 2}  # weights are max(y - tau, 0) to this power, y = (z - max z) / power


def sparse_weights(z: torch.Tensor, power: int) -> torch.Tensor:
    """Each row of z [n, m] projected: at least one finite entry, -inf for what has no weight."""
    y = (z - z.detach().amax(1, keepdim=True)) / power  # tau >= -1: what lies below -1 is outside, wherever it lies
    with torch.no_grad():
        s = y.clamp_min(-2).sort(1, descending=True).values
        k = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
        mean = s.cumsum(1) / k
        if power == 1:
            inside = mean - 1 / k < s
        else:
            inside = mean - ((1 - k * ((s**2).cumsum(1) / k - mean**2)) / k).clamp_min(0).sqrt() < s
        k = inside.sum(1, keepdim=True)
        S = (y >= s.gather(1, k - 1)) & (y > -1)  # the support; equal scores are in it or out of it together
    y, k = torch.where(S, y, 0), S.sum(1, keepdim=True)
    mean = y.sum(1, keepdim=True) / k
    if power == 1:
        return torch.where(S, y - mean + 1 / k, 0).clamp_min(0)
    deviation = torch.where(S, y - mean, 0)
    tau = mean - ((1 - (deviation**2).sum(1, keepdim=True)) / k).sqrt()
    return torch.where(S, y - tau, 0).clamp_min(0) ** 2


def dictionary_lookup_reference(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, weighting: str
) -> torch.Tensor:
    """R = P V with P = sparse_weights(scale * Q K^T): [n, Dv], dtype of values."""
    Q, K, V = queries.double(), keys.double(), values.double()
    known, usable = Q.isfinite().all(1), K.isfinite().all(1)
    z = scale * (torch.where(known[:, None], Q, 0) @ torch.where(usable[:, None], K, 0).T)
    P = sparse_weights(torch.where(usable, z, -torch.inf).where(usable.any(), 0), POWERS[weighting])
    R = P @ torch.where(V.isfinite(), V, 0)
    lost = (P > 0).double() @ (~V.isfinite()).double() > 0  # a value that is not finite, of an atom that is chosen
    lost = lost | ~known[:, None] | ~usable.any()
    return R.masked_fill(lost, torch.nan).to(values.dtype)
