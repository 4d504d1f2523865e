"""knn: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice, check_int32_range, check_matrices
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.knn.cases import cases, compare
from planmill.kernels.neighbors.knn.reference import METRICS, knn_reference

MAX_K = 1024


def distances_of(queries: torch.Tensor, rows: torch.Tensor, metric: str) -> torch.Tensor:
    """Distances [n, k] of queries [n, d] to rows [n, k, d]; similarities for "dot"."""
    q = queries[:, None]
    if metric == "dot":
        return (q * rows).sum(2)
    if metric == "cosine":
        tiny = torch.finfo(queries.dtype).tiny
        return 1 - (F.normalize(q, dim=2, eps=tiny) * F.normalize(rows, dim=2, eps=tiny)).sum(2)
    squared = ((q - rows) ** 2).sum(2)
    return squared if metric == "l2sq" else torch.linalg.vector_norm(q - rows, dim=2)


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the distances through the k rows found; the n x m matrix is not needed for it either."""
    queries, database, _, metric, _, _ = args
    indices, gradient = outputs[1], grads[0]
    if database.shape[0] == 0:
        return torch.zeros_like(queries), torch.zeros_like(database), None, None, None, None
    chosen = indices.clamp_min(0).long()
    q = queries.detach().double().requires_grad_()
    rows = database.detach()[chosen].double().requires_grad_()
    with torch.enable_grad():
        distances = distances_of(q, rows, metric)
    weight = torch.where(indices >= 0, gradient, 0).double()
    for_queries, for_rows = torch.autograd.grad(distances, (q, rows), weight)
    for_database = torch.zeros_like(database, dtype=torch.float64)
    for_database = for_database.index_add(0, chosen.flatten(), for_rows.flatten(0, 1))
    return for_queries.to(queries.dtype), for_database.to(database.dtype), None, None, None, None


SPEC = OpSpec(
    schema="knn(Tensor queries, Tensor database, int k, str metric, bool exclude_self, bool exact) -> (Tensor, Tensor)",
    outputs=lambda queries, database, k, metric, exclude_self, exact: [
        ((queries.shape[0], k), torch.float32),
        ((queries.shape[0], k), torch.int32),
    ],
    reference=knn_reference,
    portable="portable:knn_portable",
    cases=cases,
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def find_neighbors(
    queries: torch.Tensor,
    database: torch.Tensor,
    k: int,
    metric: str = "l2",
    *,
    exclude_self: bool = False,
    exact: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k nearest rows of a database for each query, found exactly and without the n x m matrix.

    With `exact=True` the database is screened in 16-bit arithmetic (AMX-bf16 where the processor has it, 16-bit
    integers otherwise) under a proven error bound, and every row that could be among the k nearest is evaluated again
    in float32, by direct differences for "l2" and "l2sq": the neighbours are those of float32 arithmetic, duplicates
    have distance 0, and for these two data far from the origin loses nothing. On a CPU a result depends on its query
    and the rows it names, whatever else is in the batch or the database. With `exact=False` the screened values are
    returned as they are: neighbours whose distances differ by less than about 1e-3 of the vectors' length may change
    places.

    Args:
        queries: [n, D] with D >= 1, float32, bfloat16 or float16, any strides.
        database: [m, D], dtype and device of `queries`, any strides.
        k: number of neighbours, 1 to 1024.
        metric: "l2", "l2sq" (squared), "cosine" (1 - cosine similarity; 1 for a zero row) or "dot" (larger is nearer).
        exclude_self: query i does not match row i; needs n = m.
        exact: see above.

    Returns:
        distances: [n, k] float32, nearest first: ascending, descending for "dot".
        indices: [n, k] int32; ties go to the lower index. Where fewer than k rows match: distance inf (-inf for "dot")
            and index -1. Rows that hold NaN or infinity match nothing.

    Raises:
        ValueError: wrong rank or width, k outside 1 to 1024, an unknown metric, `exclude_self` with n != m.
        TypeError: another dtype, or dtypes that differ.

    Source: brute-force kNN as in Johnson, Douze, Jegou, "Billion-scale similarity search with GPUs", section 5.
    """
    op = "knn"
    check_matrices(op, queries, database)
    check_choice(op, "metric", metric, METRICS)
    if not 1 <= k <= MAX_K:
        raise ValueError(f"{op}: k must be from 1 to {MAX_K}, got {k}")
    rows = database.shape[0]
    if exclude_self and queries.shape[0] != rows:
        raise ValueError(f"{op}: exclude_self needs as many queries as rows, got {queries.shape[0]} and {rows}")
    check_int32_range(op, "database", rows)
    return (_op if is_compiling() else _call)(queries, database, k, metric, exclude_self, exact)
