"""constrained_search: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import (
    check_choice,
    check_device,
    check_dtype,
    check_int32_range,
    check_matrices,
    check_rank,
)
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.constrained_search.cases import cases, compare
from planmill.kernels.neighbors.constrained_search.grid import Grid, build_grid, find_ranges
from planmill.kernels.neighbors.constrained_search.reference import constrained_search_reference
from planmill.kernels.neighbors.knn.op import MAX_K
from planmill.kernels.neighbors.knn.op import backward as knn_backward
from planmill.kernels.neighbors.knn.reference import METRICS

OP = "constrained_search"
LONGEST = 1e150  # a radius whose square float64 holds


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the distances through the k rows found, as in knn; positions only choose."""
    queries, database, *_, k, _, metric = args
    for_queries, for_database, *_ = knn_backward((queries, database, k, metric, False, True), outputs, grads)
    return for_queries, for_database, None, None, None, None, None, None, None


SPEC = OpSpec(
    schema="constrained_search(Tensor queries, Tensor database, Tensor query_positions, Tensor positions, Tensor rows, "
    "Tensor ranges, int k, float radius, str metric) -> (Tensor, Tensor)",
    outputs=lambda queries, database, query_positions, positions, rows, ranges, k, radius, metric: [
        ((queries.shape[0], k), torch.float32),
        ((queries.shape[0], k), torch.int32),
    ],
    reference=constrained_search_reference,
    portable="portable:constrained_search_portable",
    cases=cases,
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def check_positions(name: str, positions: torch.Tensor, features_name: str, features: torch.Tensor) -> None:
    """Raise unless `positions` are [n, p] of 1 to 3 axes, one for each row of `features`."""
    n = features.shape[0]
    if positions.dim() != 2 or positions.shape[0] != n or not 1 <= positions.shape[1] <= 3:
        raise ValueError(f"{OP}: {name} must be [{n}, p] with p from 1 to 3, got {list(positions.shape)}")
    if not positions.is_floating_point() and positions.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{OP}: {name} must be floating point, int32 or int64, got {positions.dtype}")
    check_device(OP, name, positions, features_name, features)


def check_segments(name: str, segments: torch.Tensor, features_name: str, features: torch.Tensor) -> None:
    """Raise unless `segments` are [n] integers, one for each row of `features`."""
    if segments.dim() != 1 or segments.shape[0] != features.shape[0]:
        raise ValueError(f"{OP}: {name} must be [{features.shape[0]}], got {list(segments.shape)}")
    check_dtype(OP, name, segments, torch.int32, torch.int64)
    check_device(OP, name, segments, features_name, features)


def check_radius(radius: float) -> None:
    """Raise unless `radius` is a length."""
    if not 0 <= radius <= LONGEST:
        raise ValueError(f"{OP}: radius must be from 0 to {LONGEST:g}, got {radius}")


def grid_of(
    database: torch.Tensor, positions: torch.Tensor | None, segments: torch.Tensor | None, radius: float | None
) -> Grid:
    """Check what constrains a database, and sort its rows by it."""
    check_rank(OP, "database", database, 2, "[m, D]")
    check_int32_range(OP, "database", database.shape[0])
    if positions is None and segments is None:
        raise ValueError(f"{OP}: give positions and radius, segments, or both; find_neighbors searches without them")
    if (positions is None) != (radius is None):
        raise ValueError(
            f"{OP}: positions and radius belong together, got only {'positions' if radius is None else 'radius'}"
        )
    if segments is not None:
        check_segments("segments", segments, "database", database)
    if positions is None or radius is None:
        return build_grid(database.new_empty(database.shape[0], 0, dtype=torch.float64), segments, 0.0)
    check_positions("positions", positions, "database", database)
    check_radius(radius)
    return build_grid(positions.detach().double(), segments, radius)


def search_grid(
    grid: Grid,
    queries: torch.Tensor,
    database: torch.Tensor,
    k: int,
    positions: torch.Tensor | None,
    segments: torch.Tensor | None,
    radius: float | None,
    metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Check the queries' side, find their ranges, and search them."""
    check_matrices(OP, queries, database)
    check_choice(OP, "metric", metric, METRICS)
    if not 1 <= k <= MAX_K:
        raise ValueError(f"{OP}: k must be from 1 to {MAX_K}, got {k}")
    axes = grid.positions.shape[1]
    if (positions is None) != (axes == 0):
        raise ValueError(f"{OP}: query_positions must be given where positions are, and only there")
    if (segments is None) != (grid.segments.shape[0] == 0) and database.shape[0] > 0:
        raise ValueError(f"{OP}: query_segments must be given where segments are, and only there")
    if segments is not None:
        check_segments("query_segments", segments, "queries", queries)
    if positions is None:
        own = queries.new_empty(queries.shape[0], 0, dtype=torch.float64)
    else:
        check_positions("query_positions", positions, "queries", queries)
        if positions.shape[1] != axes:
            raise ValueError(f"{OP}: query_positions must have {axes} axes like positions, got {positions.shape[1]}")
        own = positions.detach().double()
    ranges = find_ranges(grid, own, segments, radius or 0.0)
    call = _op if is_compiling() else _call
    return call(queries, database, own, grid.positions, grid.rows, ranges, k, float(radius or 0.0), metric)


def find_constrained_neighbors(
    queries: torch.Tensor,
    database: torch.Tensor,
    k: int,
    metric: str = "l2",
    *,
    query_positions: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
    radius: float | None = None,
    query_segments: torch.Tensor | None = None,
    segments: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k rows nearest in appearance among those near the query's position and / or in its segment.

    `N(q) = k nearest by |q - x| of { x : |pos_q - pos_x| <= radius and seg_q = seg_x }`, exactly: neither the n x m
    matrix nor a mask of that size exists. The rows are sorted by segment and by cell of a grid as fine as the radius,
    which costs one sort of m keys; a query then looks into at most 3^p neighbouring cells, and distances are evaluated
    in float32 by direct differences for rows within the radius only. `GridIndex` keeps the sorted rows for many calls.

    Args:
        queries: [n, D] with D >= 1, float32, bfloat16 or float16, any strides.
        database: [m, D], dtype and device of `queries`, any strides.
        k: number of neighbours, 1 to 1024.
        metric: "l2", "l2sq" (squared), "cosine" (1 - cosine similarity; 1 for a zero row) or "dot" (larger is nearer).
        query_positions: [n, p] with p from 1 to 3, floating point, int32 or int64; compared in float64.
        positions: [m, p], the positions of the rows, likewise.
        radius: largest Euclidean distance between positions, in their unit; 0 asks for equal ones.
        query_segments: [n], int32 or int64: the camera, image or region that a query belongs to.
        segments: [m], likewise of the rows.

    Returns:
        distances: [n, k] float32, nearest first: ascending, descending for "dot".
        indices: [n, k] int32; ties go to the lower index. Where fewer than k rows match: distance inf (-inf for "dot")
            and index -1. Rows and positions that hold NaN or infinity match nothing. A query's result does not depend
            on the others.

    Raises:
        ValueError: wrong rank, length or width, k outside 1 to 1024, an unknown metric, neither positions nor segments,
            one side of a constraint without the other, a radius that is negative or not finite.
        TypeError: another dtype, or dtypes that differ.

    Source: after CANN (Aiger, Araujo, Lynen, "Yes, we CANN: constrained approximate nearest neighbors for local
        feature-based visual localization", ICCV 2023), which joins appearance with the camera that a point belongs to;
        exact here. The geometric radius and the sorted grid are ours.
    """
    check_matrices(OP, queries, database)
    grid = grid_of(database, positions, segments, radius)
    return search_grid(grid, queries, database, k, query_positions, query_segments, radius, metric)
