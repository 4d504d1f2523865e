"""segmented_max: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_dtype, check_int32_range, check_matrices, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.segmented_max.cases import cases, compare
from planmill.kernels.neighbors.segmented_max.reference import segmented_max_reference


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the values: each reaches one query and the row that its index names."""
    queries, database, _ = args
    indices, gradient = outputs[1], grads[0]
    if database.shape[0] == 0:
        return torch.zeros_like(queries), torch.zeros_like(database), None
    found = indices >= 0
    rows = indices.clamp_min(0).flatten().long()
    weight = torch.where(found, gradient, 0).double()
    picked = database[rows].view(*indices.shape, -1).double()
    for_queries = (weight[..., None] * picked).sum(1)
    spread = (weight[..., None] * queries.double()[:, None]).flatten(0, 1)
    for_database = torch.zeros_like(database, dtype=torch.float64).index_add(0, rows, spread)
    return for_queries.to(queries.dtype), for_database.to(database.dtype), None


SPEC = OpSpec(
    schema="segmented_max(Tensor queries, Tensor database, Tensor offsets) -> (Tensor, Tensor)",
    outputs=lambda queries, database, offsets: [
        ((queries.shape[0], offsets.shape[0] - 1), torch.float32),
        ((queries.shape[0], offsets.shape[0] - 1), torch.int32),
    ],
    reference=segmented_max_reference,
    portable="portable:segmented_max_portable",
    cases=cases,
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def check_segmented(op: str, queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor) -> None:
    """Check queries, a database and the bounds of its segments."""
    check_matrices(op, queries, database)
    check_rank(op, "offsets", offsets, 1, "[S + 1]")
    check_dtype(op, "offsets", offsets, torch.int32, torch.int64)
    if offsets.shape[0] == 0:
        raise ValueError(f"{op}: offsets must be [S + 1] with at least one entry, got {list(offsets.shape)}")
    check_int32_range(op, "database", database.shape[0])
    if offsets.device.type == "cpu" and not is_compiling():
        ordered = bool((offsets[1:] >= offsets[:-1]).all())
        if not ordered or offsets[0] != 0 or offsets[-1] != database.shape[0]:
            raise ValueError(
                f"{op}: offsets must go from 0 to {database.shape[0]} without decreasing, got {offsets.tolist()[:8]}"
            )


def maximize_by_segment(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum inner product of each query with each segment of a database, and where it is reached.

    `values[q, s] = max over x in segment s of <queries[q], x>`. The n x m matrix is never stored. With unit rows this
    is the patch-to-image similarity of MuSc; with one segment, maximum inner-product search.

    float32 inputs: the database is screened in 16-bit arithmetic with a proven error bound, and every row that could be
    the maximum is evaluated again in float32, so that the result is the float32 one. Ties go to the lower index.

    Args:
        queries: [n, D] with D >= 1, float32, bfloat16 or float16, any strides.
        database: [m, D], dtype and device of `queries`, any strides.
        offsets: [S + 1], int32 or int64, non-decreasing from 0 to m; segment s is rows `offsets[s]` to `offsets[s+1]`.

    Returns:
        values: [n, S] float32; -inf where a segment has no match.
        indices: [n, S] int32 into the database; -1 where a segment has no match. Rows that hold NaN or infinity, and
            empty segments, match nothing.

    Raises:
        ValueError: wrong rank, different D, D = 0, or offsets that do not go from 0 to m without decreasing (checked
            for offsets on the CPU; on a GPU the check would stop the stream).
        TypeError: another dtype, or dtypes that differ.

    Source: MuSc (Li et al., ICLR 2024), section 3.2, generalised to segments.
    """
    check_segmented("segmented_max", queries, database, offsets)
    return (_op if is_compiling() else _call)(queries, database, offsets)
