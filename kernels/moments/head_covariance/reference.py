"""Cross-covariances of pairs of heads; float64."""

import torch
from torch.nn import functional as F

CENTERINGS = ("scalar", "channel", "none")
PAIRINGS = ("adjacent", "first", "halves", "all")


def pair_heads(heads: int, pairing: str) -> list[tuple[int, int]]:
    """The pairs (i, j), i < j, in order."""
    if pairing == "adjacent":
        return [(i, i + 1) for i in range(heads - 1)]
    if pairing == "first":
        return [(0, j) for j in range(1, heads)]
    if pairing == "halves":
        return [(i, i + heads // 2) for i in range(heads // 2)]
    return [(i, j) for i in range(heads) for j in range(i + 1, heads)]


def head_covariance_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int, eps: float, centering: str, pairing: str,
    interleaved: bool, normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """Matrices [B, P, d, d] float32 of the P pairs of heads of tokens x [B, T, heads * d]."""
    d = x.shape[2] // heads
    z = x.double()
    z = z.unflatten(2, (d, heads)).transpose(2, 3) if interleaved else z.unflatten(2, (heads, d))
    if weight.numel() > 0:
        z = F.layer_norm(z, (d,), weight.double(), bias.double(), eps)
    z = z.transpose(1, 2)  # X_q [B, heads, T, d]
    if centering == "scalar":
        z = z - z.mean((2, 3), keepdim=True)
    elif centering == "channel":
        z = z - z.mean(2, keepdim=True)
    pairs = pair_heads(heads, pairing)
    c = z[:, [i for i, _ in pairs]].mT @ z[:, [j for _, j in pairs]] / max(x.shape[1], 1)  # C = X_i^T X_j / T
    if normalize:
        c = c / c.norm(dim=2, keepdim=True).clamp_min(1e-12)
    return c.float()
