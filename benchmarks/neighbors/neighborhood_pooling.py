"""neighborhood_pooling against PyTorch's own layers. Error: largest absolute difference within one random image."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.neighbors import pool_neighborhood
from planmill.kernels.neighbors.neighborhood_pooling.reference import neighborhood_pooling_reference

from ..cases import Case, Draw, Peer, plain


def make(images: int, side: int, width: int, size: int) -> Callable[[Draw], tuple]:
    """Gaussian features with a mean and a scale of their own in every channel, as a backbone's are."""

    def draw_all(draw: Draw) -> tuple:
        scale, mean = draw.normal(width).abs() + 0.1, draw.normal(width)
        return draw.normal(images, side * side, width) * scale + mean, (side, side), size

    return draw_all


def formula(features: torch.Tensor, grid: tuple[int, int], size: int) -> torch.Tensor:
    """layer_norm, avg_pool2d, normalize."""
    n, p, c = features.shape
    image = F.layer_norm(features, (p, c)).transpose(1, 2).reshape(n, c, *grid)
    pooled = F.avg_pool2d(image, size, 1, size // 2).reshape(n, c, p).transpose(1, 2)
    return F.normalize(pooled, dim=2)


def check(args: tuple, pooled: torch.Tensor) -> float:
    """One random image in float64; images do not depend on each other."""
    features, grid, size = args
    if pooled.shape != features.shape:
        return torch.nan
    i = int(torch.randint(len(features), ()))
    want = neighborhood_pooling_reference(features[i : i + 1].double(), *grid, size)
    return float((pooled[i].double() - want[0]).abs().max())


CASES = [
    Case(
        op="neighborhood_pooling",
        id="N16-37x37-C1024-r3",
        make=make(16, 37, 1024, 3),
        small=make(2, 9, 256, 3),
        ours=pool_neighborhood,
        peers={"torch layer_norm + avg_pool2d + normalize": Peer(plain(formula))},
        check=check,
        tolerance={torch.float32: 1e-5},
        # Statistics 5, separable window 2r, length and division 3 operations per value.
        flops=lambda features, grid, size: (8.0 + 2 * size) * features.numel(),
        memory=True,
    )
]
