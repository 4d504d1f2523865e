"""From patch features to anomaly maps and picture scores, without training (MuSc)."""

from collections.abc import Sequence

import torch
from torch.nn import functional as F

from planmill.inspection.results import Progress
from planmill.kernels.neighbors.mutual_score import score_mutually
from planmill.kernels.neighbors.neighbor_rescoring import rescore_by_neighbors
from planmill.kernels.neighbors.neighborhood_pooling import pool_neighborhood


def score_patches(
    features: list[torch.Tensor],
    grid: tuple[int, int],
    degrees: Sequence[int],
    radius: float | None,
    dtype: torch.dtype,
    progress: Progress,
) -> torch.Tensor:
    """Mutual scores of every patch: mean over the layers, then over the neighbourhood widths, in float64.

    One layer and one width are in memory at a time; each layer is dropped from `features` once it is done.

    Args:
        features: per layer [N, P, C] float32; emptied.
        grid: (rows, columns) of the patches.
        degrees: neighbourhood widths r, odd, in patches.
        radius: a patch matches only patches at most this many patch widths away; None: all.
        dtype: float32: exact scores; bfloat16: within 2e-3.
        progress: told about the stage "score".

    Returns:
        [N, P] float64, in units of the distance between unit vectors.
    """
    layers = len(features)
    total: torch.Tensor | None = None
    for index in range(layers):
        layer = features.pop(0)
        for number, degree in enumerate(degrees):
            progress("score", index * len(degrees) + number, layers * len(degrees))
            pooled = pool_neighborhood(layer, grid, degree).to(dtype)
            scores = score_mutually(pooled, radius=radius, grid=grid).double() / (layers * len(degrees))
            total = scores if total is None else total + scores
            del pooled
        del layer
    progress("score", layers * len(degrees), layers * len(degrees))
    if total is None:
        raise ValueError("features is empty")
    return total


def interpolate_maps(scores: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Patch scores [N, rows, columns] as maps [N, height, width]: bilinear, corner patches on the corner pixels."""
    return F.interpolate(scores.unsqueeze(1), size=size, mode="bilinear", align_corners=True).squeeze(1)


def score_pictures(
    maps: torch.Tensor, descriptors: torch.Tensor, size: tuple[int, int], neighbors: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of whole pictures.

    Args:
        maps: [N, rows, columns] float64, patch scores.
        descriptors: [N, E] float32, one vector per picture, of any length.
        size: (height, width) that maps are interpolated to before their maximum is taken.
        neighbors: neighbourhood sizes k of the re-scoring; a k above N means all pictures.

    Returns:
        raw: [N] float64, maximum of the interpolated map. score: [N] float32 in 0..1, raw scores averaged with those of
        similar pictures.
    """
    raw = torch.stack([interpolate_maps(one[None], size).amax() for one in maps])
    unit = F.normalize(descriptors.float(), dim=1)
    return raw, rescore_by_neighbors(raw.float(), unit, neighbors)
