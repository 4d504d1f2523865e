"""Mutual matching on the GPU: the symmetric search of mutual scoring, the two maps standing in for a pair of images.

Row and column minima come from the same tiles, and a second look in float32 settles them. The ratio test needs second
neighbours, which that search does not keep: there the k = 2 nearest neighbours are found from either side. Rows without
a direction are NaN, and so are those that make two maps equally long: they match nothing.
"""

import torch

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import SETTLE_C, SETTLE_Q, SETTLE_ROWS, Match, match_segments, settle_warps
from planmill.kernels.common.triton_search import settle_kernel
from planmill.kernels.neighbors.knn import _triton as knn


def direct(x: torch.Tensor, weight: float) -> torch.Tensor:
    """Rows of length `weight`, float32; NaN where a row has no direction."""
    x = x.float()
    largest = x.abs().amax(-1, keepdim=True)  # NaN and infinity propagate
    usable = largest.isfinite() & (largest > 0)
    exponent = torch.frexp(largest).exponent
    x = torch.ldexp(torch.ldexp(x, -(exponent // 2)), -(exponent - exponent // 2))  # squares in range; exact
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(usable, x * (weight / length), torch.nan)


def fuse(x: torch.Tensor, x2: torch.Tensor, weight: float, weight2: float) -> torch.Tensor:
    """Both features side by side; D2 = 0: the first alone."""
    return torch.cat([direct(x, weight), direct(x2, weight2)], -1) if x2.shape[-1] else direct(x, weight)


def _nearest(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Distances and indices [n] of a's nearest rows in b, and indices [m] of b's in a."""
    n, m, rows = a.shape[0], b.shape[0], max(a.shape[0], b.shape[0])
    both = a.new_full((2, rows, a.shape[1]), torch.nan)
    both[0, :n], both[1, :m] = a, b
    offsets = torch.arange(3, dtype=torch.int32, device=a.device) * rows
    distances = torch.full((2, rows, 2), torch.inf, dtype=torch.float32, device=a.device)
    indices = torch.full((2, rows, 2), -1, dtype=torch.int32, device=a.device)
    match_segments(Match(both, both, offsets, exact=True, symmetric=True), distances, indices)
    nearest = indices[0, :n, 1]
    return distances[0, :n, 1], torch.where(nearest >= 0, nearest - rows, -1), indices[1, :m, 0]


def _two_nearest(a: torch.Tensor, b: torch.Tensor, ratio: float) -> tuple[torch.Tensor, ...]:
    """The same, and which rows of either side pass the ratio test."""
    there, index = knn.launch(a, b, 2, "l2", False, True)
    back, index_back = knn.launch(b, a, 2, "l2", False, True)
    clear, clear_back = (x[:, 0] <= ratio * x[:, 1] for x in (there, back))
    return there[:, 0], index[:, 0], index_back[:, 0], clear, clear_back


def _entry(a: torch.Tensor, b: torch.Tensor, size: float, ratio: float) -> tuple[torch.Tensor, ...]:
    if ratio < 1:
        distance, nearest, back, clear, clear_back = _two_nearest(a, b, ratio)
    else:
        distance, nearest, back = _nearest(a, b)
        clear, clear_back = nearest >= 0, back >= 0
    there = nearest.long().clamp_min(0)
    own = torch.arange(a.shape[0], dtype=torch.int32, device=a.device)
    mutual = (nearest >= 0) & (back[there] == own) & clear & clear_back[there]
    scores = torch.where(nearest >= 0, size - 0.5 * distance * distance, -torch.inf)
    return scores, nearest, back, torch.where(mutual, nearest, -1)


def launch(
    a: torch.Tensor, b: torch.Tensor, a2: torch.Tensor, b2: torch.Tensor, weight: float, weight2: float, ratio: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, nearest, nearest_back and indices; the contract of `match_mutually`."""
    batch, n, m = a.shape[0], a.shape[1], b.shape[1]
    with torch.cuda.device_of(a):
        scores = torch.full((batch, n), -torch.inf, dtype=torch.float32, device=a.device)
        nearest, indices = (torch.full((batch, n), -1, dtype=torch.int32, device=a.device) for _ in range(2))
        back = torch.full((batch, m), -1, dtype=torch.int32, device=a.device)
        if batch == 0 or n == 0 or m == 0:
            return scores, nearest, back, indices
        size = weight**2 + (weight2**2 if a2.shape[-1] else 0.0)
        for entry in range(batch):  # of one entry at a time, the fused rows are held
            z_a, z_b = (fuse(x[entry], x2[entry], weight, weight2) for x, x2 in ((a, a2), (b, b2)))
            scores[entry], nearest[entry], back[entry], indices[entry] = _entry(z_a, z_b, size, ratio)
    return scores, nearest, back, indices


STATIC = [  # the rest stands in kernels/common/triton_match.py and in knn
    StaticKernel(
        settle_kernel,
        pointers={"offsets_ptr": "*i32", "where_ptr": "*i32", "out_where_ptr": "*i32"},
        scalars={"rounding": "fp32"},
        constants={"EXACT": True, "SYMMETRIC": True, "RADIUS": False, "DOT": False, "INDICES": True,
                   "BLOCK_R": SETTLE_ROWS, "BLOCK_C": SETTLE_C, "BLOCK_Q": SETTLE_Q,
                   "x_stride_c": 1, "y_stride_c": 1},
        num_warps=settle_warps(symmetric=True, indices=True, dot=False),
    )
]  # fmt: skip
