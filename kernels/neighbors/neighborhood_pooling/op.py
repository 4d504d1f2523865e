"""neighborhood_pooling: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.neighborhood_pooling.cases import cases
from planmill.kernels.neighbors.neighborhood_pooling.reference import neighborhood_pooling_reference

SPEC = OpSpec(
    schema="neighborhood_pooling(Tensor features, int height, int width, int size) -> Tensor",
    outputs=lambda features, height, width, size: [(features.shape, features.dtype)],
    reference=neighborhood_pooling_reference,
    cases=cases,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def pool_neighborhood(features: torch.Tensor, grid: tuple[int, int], size: int = 3) -> torch.Tensor:
    """Patch features averaged over a square neighbourhood, as unit rows.

    Per image: LayerNorm jointly over all patches and channels (no affine, eps 1e-5); average over the `size` x `size`
    window around each patch, where positions outside the grid count as zero and the divisor stays `size` squared; each
    row divided by its length (a zero row stays zero).

    Args:
        features: [N, P, C], float32, bfloat16 or float16, any strides; patches in row-major order of the grid, without
            class tokens.
        grid: (height, width) of the patches, height * width = P.
        size: width of the window in patches, odd; 1 pools nothing.

    Returns:
        [N, P, C], dtype of `features`, unit rows. Statistics are float32 at least. An image that holds NaN or infinity
        comes back as NaN; other images are not touched by it.

    Raises:
        ValueError: wrong rank, a grid that does not hold P patches, an even or non-positive size.
        TypeError: another dtype.

    Source: MuSc (Li et al., ICLR 2024), section 3.1 (LNAMD); the published unfold and adaptive average equal this.
    """
    op = "neighborhood_pooling"
    check_rank(op, "features", features, 3, "[N, P, C]")
    check_float(op, "features", features)
    if min(grid) < 1 or grid[0] * grid[1] != features.shape[1]:
        raise ValueError(f"{op}: grid must hold P = {features.shape[1]} patches, got {grid[0]} x {grid[1]}")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"{op}: size must be odd and positive, got {size}")
    return (_op if is_compiling() else _call)(features, grid[0], grid[1], size)
