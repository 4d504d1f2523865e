"""mutual_score: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.mutual_score.cases import cases, compare
from planmill.kernels.neighbors.mutual_score.reference import mutual_score_reference

SPEC = OpSpec(
    schema="mutual_score(Tensor features, float low, float high, float radius, int width, bool exact) -> Tensor",
    outputs=lambda features, low, high, radius, width, exact: [
        ((features.shape[0], features.shape[1]), torch.float32),
    ],
    reference=mutual_score_reference,
    portable="portable:mutual_score_portable",
    cases=cases,
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def check_scoring(
    op: str,
    features: torch.Tensor,
    low: float,
    high: float,
    radius: float | None,
    grid: tuple[int, int] | None,
    exact: bool | None,
) -> tuple[float, float, float, int, bool]:
    """Check what mutual and bank scoring share; returns the op's scalars (low, high, radius, width, exact)."""
    check_rank(op, "features", features, 3, "[N, P, C]")
    check_float(op, "features", features)
    _, patches, channels = features.shape
    if patches == 0 or channels == 0:
        raise ValueError(f"{op}: features must be [N, P, C] with P and C at least 1, got {list(features.shape)}")
    if not (low >= 0 and high > 0):
        raise ValueError(f"{op}: low must be >= 0 and high > 0, got low={low} and high={high}")
    if grid is not None and grid[0] * grid[1] != patches:
        raise ValueError(f"{op}: grid must hold P = {patches} patches, got {grid[0]} x {grid[1]}")
    if exact is None:
        exact = features.dtype is torch.float32
    if radius is None:
        return low, high, -1.0, 1, exact
    if radius < 0:
        raise ValueError(f"{op}: radius must be >= 0 patches, got {radius}")
    if grid is None:
        raise ValueError(f"{op}: radius needs grid=(height, width) of the patches")
    return low, high, float(radius), grid[1], exact


def score_mutually(
    features: torch.Tensor,
    low: float = 0.0,
    high: float = 0.3,
    *,
    radius: float | None = None,
    grid: tuple[int, int] | None = None,
    exact: bool | None = None,
) -> torch.Tensor:
    """Anomaly score of every patch, from the other images of the set alone.

    `a_p(j) = min over q of |z_i^p - z_j^q|` for each other image j; the score of patch p is the mean of the lowest
    interval of its N - 1 distances, sorted: entries `floor(low * (N-1))` to `floor(high * (N-1)) - 1`. Each unordered
    pair of images is visited once: row and column minima come from the same tile.

    With `exact=True` a 16-bit pass with a proven error bound names the candidates, and their distances are computed
    again in float32 by direct differences: errors near 1e-7 of the distance, also between duplicates and far from the
    origin. With `exact=False` the 16-bit result stands (AMX-bf16 where the processor has it, otherwise 16-bit
    integers), with the norms of the rounded vectors: scores of unit rows within 2e-3.

    Args:
        features: [N, P, C], float32, bfloat16 or float16, any strides; N images of P patches, usually with unit rows.
        low: lower end of the interval: a fraction of the other images below 1, a number of images from 1 on.
        high: upper end of the interval, likewise. At least one image is always kept.
        radius: a patch matches only patches whose centres are at most this many patch widths away; None: all.
        grid: (height, width) of the patches; needed with `radius`.
        exact: see above; default: True for float32, False for half precision.

    Returns:
        [N, P] float32, in units of the features' distance. A patch that holds NaN or infinity matches nothing and
        scores inf. The score of an image depends on the other images of the set: that is the method.

    Raises:
        ValueError: fewer than two images, wrong rank, a grid of another size, low < 0, high <= 0, radius < 0.
        TypeError: another dtype.

    Source: MuSc (Li et al., ICLR 2024), section 3.2 (MSM); the radius and the lower limit of one image are ours.
    """
    op = "mutual_score"
    scalars = check_scoring(op, features, low, high, radius, grid, exact)
    if features.shape[0] < 2:
        raise ValueError(
            f"{op}: features must hold at least 2 images, got {features.shape[0]}; to score one image against stored "
            "ones use MutualScorer.extend and MutualScorer.score"
        )
    return (_op if is_compiling() else _call)(features, *scalars)
