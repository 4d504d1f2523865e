"""segmented_min: schema, shape rule and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.knn.op import backward as knn_backward
from planmill.kernels.neighbors.segmented_max.op import check_segmented
from planmill.kernels.neighbors.segmented_min.cases import cases, compare
from planmill.kernels.neighbors.segmented_min.reference import segmented_min_reference


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the distances: each reaches one query and the row that its index names."""
    queries, database, _ = args
    for_queries, for_database, *_ = knn_backward((queries, database, 1, "l2", False, True), outputs, grads)
    return for_queries, for_database, None


SPEC = OpSpec(
    schema="segmented_min(Tensor queries, Tensor database, Tensor offsets) -> (Tensor, Tensor)",
    outputs=lambda queries, database, offsets: [
        ((queries.shape[0], offsets.shape[0] - 1), torch.float32),
        ((queries.shape[0], offsets.shape[0] - 1), torch.int32),
    ],
    reference=segmented_min_reference,
    portable="portable:segmented_min_portable",
    cases=cases,
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def minimize_by_segment(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance of each query to the nearest row of each segment of a database, and which row that is.

    `d[q, s] = min over x in segment s of |queries[q] - x|`. The n x m matrix is never stored. The database is screened
    in 16-bit arithmetic with a proven error bound, and every row that could be the nearest is evaluated again in
    float32 by direct differences. Ties go to the lower index.

    Args:
        queries: [n, D] with D >= 1, float32, bfloat16 or float16, any strides.
        database: [m, D], dtype and device of `queries`, any strides.
        offsets: [S + 1], int32 or int64, non-decreasing from 0 to m; segment s is rows `offsets[s]` to `offsets[s+1]`.

    Returns:
        distances: [n, S] float32; inf where a segment has no match.
        indices: [n, S] int32 into the database; -1 where a segment has no match. Rows that hold NaN or infinity, and
            empty segments, match nothing.

    Raises:
        ValueError: wrong rank, different D, D = 0, or offsets that do not go from 0 to m without decreasing (checked
            for offsets on the CPU; on a GPU the check would stop the stream).
        TypeError: another dtype, or dtypes that differ.

    Source: the inner minimum of CANN (Aiger et al., ICCV 2023) and of MuSc (Li et al., ICLR 2024), section 3.2.
    """
    check_segmented("segmented_min", queries, database, offsets)
    return (_op if is_compiling() else _call)(queries, database, offsets)
