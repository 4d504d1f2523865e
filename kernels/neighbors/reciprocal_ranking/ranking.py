"""k-reciprocal re-ranking, composed of knn: sets of neighbours as padded lists, their encodings as sparse rows."""

from itertools import pairwise
from typing import NamedTuple

import torch

from planmill.kernels.common.checks import check_matrices
from planmill.kernels.neighbors.knn import find_neighbors
from planmill.kernels.neighbors.knn.op import MAX_K

OP = "reciprocal_ranking"
ROWS = 1024  # whose sets are expanded at a time
PRODUCTS = 1 << 22  # pairs of entries in one column that are added up at a time


class Sparse(NamedTuple):
    """Rows of (column, value), one after the other; `row` ascends."""

    row: torch.Tensor
    column: torch.Tensor
    value: torch.Tensor


def _spread(counts: torch.Tensor, starts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For items of `counts` entries each from `starts` on: the item of each entry, and the entry's position."""
    item = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    first = counts.cumsum(0) - counts
    return item, starts[item] + torch.arange(len(item), device=counts.device) - first[item]


def _bounds(sorted_index: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Count and first position of each of `size` values in an ascending tensor."""
    counts = torch.bincount(sorted_index, minlength=size)
    return counts, counts.cumsum(0) - counts


def _reciprocal(rank: torch.Tensor, rows: torch.Tensor, k: int) -> torch.Tensor:
    """[rows, k + 1] bool: which of the k + 1 nearest of each row have it among theirs."""
    near = rank[rows, : k + 1]
    return (rank[near, : k + 1] == rows[:, None, None]).any(2)


def _expanded_sets(rank: torch.Tensor, rows: torch.Tensor, k1: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The expanded sets R* of `rows` as pairs (row, member), sorted: R and each R'(j) of which over 2/3 lie in R."""
    own = torch.where(_reciprocal(rank, rows, k1), rank[rows, : k1 + 1], -1)  # R, padded with -1
    half = round(k1 / 2)
    members = own.clamp_min(0)
    unique, inverse = members.unique(return_inverse=True)
    other = torch.where(_reciprocal(rank, unique, half), rank[unique, : half + 1], -1)[
        inverse
    ]  # R'(j) [rows, j, half+1]
    inside = (other[..., None] == own[:, None, None, :]).any(3) & (other >= 0)
    size = (other >= 0).sum(2)
    taken = (own >= 0) & (3 * inside.sum(2) > 2 * size)
    union = torch.cat([own, torch.where(taken[..., None], other, -1).flatten(1)], 1).sort(1).values
    kept = union >= 0
    kept[:, 1:] &= union[:, 1:] != union[:, :-1]
    at = kept.nonzero()
    return rows[at[:, 0]], union[kept]


def _squared(f: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """|f[a] - f[b]|^2 of pairs, by differences."""
    step = max(1, PRODUCTS // f.shape[1])
    parts = [(f[x] - f[y]).square().sum(1) for x, y in zip(a.split(step), b.split(step), strict=True)]
    return torch.cat(parts) if parts else f.new_empty(0)


def _farthest(f: torch.Tensor) -> torch.Tensor:
    """Squared distance of each row to the row farthest from it: the largest |y|^2 - 2 x.y names it."""
    ones = f.new_ones(len(f), 1)
    found = find_neighbors(torch.cat([-2 * f, ones], 1), torch.cat([f, f.square().sum(1, keepdim=True)], 1), 1, "dot")[
        1
    ]
    return _squared(f, torch.arange(len(f), device=f.device), found[:, 0].long())


def _encode(f: torch.Tensor, rank: torch.Tensor, farthest: torch.Tensor, k1: int) -> Sparse:
    """V: exp(-D) on the expanded set of each row, its sum one."""
    total = len(f)
    width = min(k1 + 1, rank.shape[1])
    step = max(1, min(ROWS, PRODUCTS // (width * width * (round(k1 / 2) + 1))))  # the comparisons of a row's sets
    pairs = [_expanded_sets(rank, rows, k1) for rows in torch.arange(total, device=f.device).split(step)]
    row, column = (torch.cat(parts) for parts in zip(*pairs, strict=True))
    value = (-_squared(f, row, column) / farthest[row]).exp()
    return Sparse(row, column, value / f.new_zeros(total).index_add(0, row, value)[row])


def _average(v: Sparse, rank: torch.Tensor, k2: int) -> Sparse:
    """Each row's mean over the encodings of its k2 nearest rows, itself included."""
    total = len(rank)
    counts, starts = _bounds(v.row, total)
    near = rank[:, :k2]
    item, position = _spread(counts[near].flatten(), starts[near].flatten())
    key = (item // near.shape[1]) * total + v.column[position]
    unique, inverse = key.unique(return_inverse=True)
    value = v.value.new_zeros(len(unique)).index_add(0, inverse, v.value[position]) / near.shape[1]
    return Sparse(unique // total, unique % total, value)


def _overlap(v: Sparse, queries: int, total: int) -> torch.Tensor:
    """t[i, j] = sum over l of min(V_il, V_jl) of queries i and gallery rows j: entries meet column by column."""
    gallery = total - queries
    theirs = v.row >= queries
    column, order = v.column[theirs].sort(stable=True)
    row, value = v.row[theirs][order] - queries, v.value[theirs][order]
    counts, starts = _bounds(column, total)
    mine = [x[~theirs] for x in v]
    work = counts[mine[1]]
    result = v.value.new_zeros(queries * gallery)
    cuts = torch.searchsorted(work.cumsum(0), work.new_tensor(range(PRODUCTS, int(work.sum()), PRODUCTS)), right=True)
    bounds = [0, *cuts.tolist(), len(work)]
    for first, last in pairwise(bounds):
        item, position = _spread(work[first:last], starts[mine[1][first:last]])
        smaller = torch.minimum(mine[2][first:last][item], value[position])
        result.index_add_(0, mine[0][first:last][item] * gallery + row[position], smaller)
    return result.view(queries, gallery)


@torch.no_grad()
def rerank_reciprocally(
    queries: torch.Tensor, gallery: torch.Tensor, *, k1: int = 20, k2: int = 6, weight: float = 0.3
) -> torch.Tensor:
    """Distances between queries and a gallery, corrected by whom both have among their reciprocal neighbours.

    Over all A rows, D is the squared distance over the row's largest. R(i) holds those of the k1 + 1 nearest rows of i
    that have i among theirs; R'(j), with k1 / 2, joins it where more than 2/3 of it lie in R(i). `V_i = exp(-D_ij)` on
    the set, sum one, then averaged over the k2 nearest rows. `t_ij = sum_l min(V_il, V_jl)`, `J = 1 - t / (2 - t)`,
    result `(1 - weight) J + weight D`. Neighbours come from exact kNN and V is sparse: nothing of size A x A is held.

    Args:
        queries: [n, D] with D >= 1, float32, bfloat16 or float16, any strides.
        gallery: [m, D], dtype and device of `queries`, any strides.
        k1: neighbours whose reciprocity is asked, 1 to 1023.
        k2: rows to average over, 1 to 1024; 1: none but the row itself.
        weight: of the original distance, 0 to 1.

    Returns:
        [n, m] float32, smaller is nearer; D is 0 where all rows are equal. The sets see all queries and the whole
        gallery: a result depends on them, that is the method.

    Raises:
        ValueError: wrong rank or width, k1, k2 or weight out of range, rows with NaN or infinity.
        TypeError: another dtype, or dtypes that differ.

    Source: Zhong et al., "Re-ranking person re-identification with k-reciprocal encoding" (CVPR 2017); in float32 where
        the published code rounds to float16, and k1 / 2 rounds half to even as it does. Ties go to the lower row.
    """
    check_matrices(OP, queries, gallery, ("queries", "gallery"))
    if not 1 <= k1 < MAX_K or not 1 <= k2 <= MAX_K:
        raise ValueError(f"{OP}: k1 must be from 1 to {MAX_K - 1} and k2 from 1 to {MAX_K}, got {k1} and {k2}")
    if not 0 <= weight <= 1:
        raise ValueError(f"{OP}: weight must be from 0 to 1, got {weight}")
    n, m = len(queries), len(gallery)
    if n == 0 or m == 0:
        return queries.new_empty(n, m, dtype=torch.float32)
    f = torch.cat([queries, gallery]).float()
    if not bool(f.isfinite().all()):
        raise ValueError(f"{OP}: queries and gallery must be finite")
    f = f / f.abs().amax().clamp_min(torch.finfo(torch.float32).tiny)  # D is relative: no square leaves float32's range
    f = f - f.mean(0)  # distances stay, their rounding shrinks
    rank = find_neighbors(f, f, min(max(k1 + 1, k2), n + m), "l2sq")[1].long()
    farthest = _farthest(f)
    farthest = torch.where(farthest > 0, farthest, 1)
    v = _encode(f, rank, farthest, k1)
    shared = _overlap(_average(v, rank, k2) if k2 > 1 else v, n, n + m)
    distance = torch.cdist(f[:n], f[n:]).square_().div_(farthest[:n, None])
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * distance
