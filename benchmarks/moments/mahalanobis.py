"""mahalanobis per position against the einsum formula. Error: largest relative error of a distance.

Ours stores the triangle in bfloat16, which is what its docstring advises; the error is against the stored factor.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.moments import measure_mahalanobis
from planmill.kernels.moments.mahalanobis.reference import mahalanobis_reference

from ..cases import Case, Draw, Goal, Peer

POSITIONS = 3136


def positions(batch: int, count: int, width: int) -> Callable[[Draw], tuple]:
    """Features, means and triangles near the identity."""

    def make(draw: Draw) -> tuple:
        entries = width * (width + 1) // 2
        factor = torch.empty(count, entries, dtype=torch.bfloat16)
        for first in range(0, count, 256):  # by parts: the float32 numbers of all would take gigabytes
            some = min(256, count - first)
            factor[first : first + some] = torch.randn(some, entries, generator=draw.generator) / width**0.5
        return draw.normal(batch, count, width), torch.zeros(count, width).to(draw.device), factor.to(draw.device)

    return make


def einsum(x: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> Callable[[], Any]:
    """sqrt((x - mean)^T P (x - mean)) with full float32 precisions, made outside the clock."""
    count, width = mean.shape
    rows, columns = torch.tril_indices(width, width, device=x.device).unbind()
    precision = torch.empty(count, width, width, device=x.device)
    for p in range(count):
        g = torch.zeros(width, width, device=x.device)
        g[rows, columns] = factor[p].float()
        precision[p] = g.T @ g
    return lambda: distances(x.float() - mean, precision)


def distances(delta: torch.Tensor, precision: torch.Tensor) -> torch.Tensor:
    """As anomalib computes them."""
    left = torch.einsum("bpc,pcd->bpd", delta, precision)
    return (left * delta).sum(2).clamp_min(0).sqrt()


def check(args: tuple, result: torch.Tensor) -> float:
    """Eight random positions."""
    x, mean, factor = args
    chosen = torch.randperm(x.shape[1])[:8].to(x.device)
    truth = mahalanobis_reference(x[:, chosen], mean[chosen], factor[chosen])
    return float(((result[:, chosen] - truth).abs() / truth).max())


CASES = [
    Case(
        op="mahalanobis",
        id=f"B{batch}-P{POSITIONS}-d{width}",
        make=positions(batch, POSITIONS, width),
        small=positions(2, 9, 12),
        ours=measure_mahalanobis,
        peers={"einsum formula": Peer(einsum, tolerance=1e-3)},
        check=check,
        tolerance={torch.float32: 1e-4},
        flops=lambda x, mean, factor: x.shape[0] * x.shape[1] * x.shape[2] * (x.shape[2] + 1),
        goals=(Goal("ratio", 2),),
    )
    for width in (100, 550)
    for batch in (1, 32)
]
