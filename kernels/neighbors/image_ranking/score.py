"""The exact objective behind CANN, composed of segmented_min."""

import torch

from planmill.kernels.neighbors.segmented_min import minimize_by_segment

REACH, EXPONENT = 120.0, 0.4591763556652752  # published for 128-d descriptors of 8-bit coordinates


def weigh_distances(distances: torch.Tensor, reach: float, exponent: float) -> torch.Tensor:
    """phi(r) = (1 - (r / p0)^a)^(1 / a) with a = p1 / (1 - p1) below p0 = `reach`, 0 from there on; float32."""
    a = exponent / (1 - exponent)
    share = (distances / reach).clamp(0, 1)
    return (1 - share**a) ** (1 / a)


def score_images(
    queries: torch.Tensor,
    database: torch.Tensor,
    offsets: torch.Tensor,
    *,
    reach: float = REACH,
    exponent: float = EXPONENT,
) -> torch.Tensor:
    """How well each image of a database explains the local features of a query image.

    `score(image) = 1/n sum over features f of phi(min over x in image of |f - x|)` with
    `phi(r) = (1 - (r/p0)^a)^(1/a)`, `a = p1 / (1 - p1)`, for r < p0 and 0 from there on. The minima are exact
    (`minimize_by_segment`); n x S of them are held, never n x m.

    Args:
        queries: [n, D] with D >= 1, float32, bfloat16 or float16: the features of one image.
        database: [m, D], dtype and device of `queries`: the features of S images, one image after the other.
        offsets: [S + 1], int32 or int64: image s has rows `offsets[s]` to `offsets[s + 1]`.
        reach: p0 > 0, in the features' unit: the distance from which on a feature says nothing.
        exponent: p1, between 0 and 1; smaller: only near matches count.

    Returns:
        [S] float32 from 0 to 1; 0 for an image without features, and for all where n = 0. A feature that holds NaN or
        infinity adds nothing, but counts in n. An image's score does not depend on the other images.

    Raises:
        ValueError: as `minimize_by_segment`; a reach or an exponent out of range.
        TypeError: another dtype, or dtypes that differ.

    Source: CANN (Aiger et al., ICCV 2023); phi, p0 and p1 as in the published code, whose minima are approximate.
    """
    if not 0 < reach < torch.inf:
        raise ValueError(f"image_ranking: reach must be above 0 and finite, got {reach}")
    if not 0 < exponent < 1:
        raise ValueError(f"image_ranking: exponent must be between 0 and 1, got {exponent}")
    weights = weigh_distances(minimize_by_segment(queries, database, offsets)[0], reach, exponent)
    return (weights.sum(0, dtype=torch.float64) / max(queries.shape[0], 1)).float()
