"""Constrained search on the GPU: one program per query walks over its ranges and keeps the k best in registers.

Positions are compared first, in float64 with fused multiply-adds: a row within that rounding of the radius may fall on
the other side than on a CPU. Features are read only where a block of slots holds a row within the radius,
and evaluated directly in float32. Costs are packed with the row's number in 64 bits that sort as the pair. A block's
keys that beat the worst of the k enter one by one: about k ln(c / k) of c candidates do.

Distances are evaluated in units of a power of two near the largest coordinate, so that no square overflows. Nothing
waits for the device: a call can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_screen import choose_frame
from planmill.kernels.neighbors.knn._triton import METRICS, unpack_keys
from planmill.kernels.neighbors.knn._triton_kernels import COSINE, NOTHING, candidate_cost, ordered_bits

BLOCK_Q, BLOCK_C, NUM_WARPS = 32, 64, 8  # slots and channels that a program holds


@triton.jit
def row_is_finite(x_ptr, o_x, m_x, channels, stride_n, stride_c, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """[BLOCK_Q]: whether rows o_x hold neither NaN nor infinity."""
    bad = tl.zeros((BLOCK_Q, BLOCK_C), tl.int32)
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        p_x = x_ptr + o_x.to(tl.int64)[:, None] * stride_n + o_c.to(tl.int64)[None, :] * stride_c
        x = tl.load(p_x, mask=m_x[:, None] & (o_c < channels)[None, :], other=0.0).to(tl.float32)
        bad += (tl.abs(x) < float("inf")).to(tl.int32) ^ 1
    return tl.sum(bad, 1) == 0


@triton.jit(do_not_specialize=["lists", "k"])
def walk_kernel(
    q_ptr, x_ptr, unit_ptr, own_ptr, position_ptr, square_ptr, row_ptr, range_ptr, key_ptr, channels, lists, k,
    q_stride_n, q_stride_c, x_stride_n, x_stride_c,
    METRIC: tl.constexpr, AXES: tl.constexpr, KEPT: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """key[query, k]: (cost, row) of the k best of the query's ranges in 64 bits, in no order; NOTHING where too few."""
    query = tl.program_id(0)
    o_k = tl.arange(0, KEPT)
    kept = tl.where(o_k < k, NOTHING, -9223372036854775808)  # what is not asked for is never the worst
    worst = tl.max(kept, 0)
    o_q = tl.zeros((BLOCK_Q,), tl.int32) + query
    m_q = tl.arange(0, BLOCK_Q) < 1
    lists = tl.where(
        tl.sum(row_is_finite(q_ptr, o_q, m_q, channels, q_stride_n, q_stride_c, BLOCK_Q, BLOCK_C).to(tl.int32), 0)
        == BLOCK_Q, lists, 0,
    )  # fmt: skip
    square = tl.load(square_ptr)
    inverse_unit = 1.0 / tl.load(unit_ptr)
    for item in range(0, lists):
        p_range = range_ptr + (query.to(tl.int64) * lists + item) * 2
        end = tl.load(p_range + 1)
        for start in range(tl.load(p_range), end, BLOCK_Q):
            o_s = (start + tl.arange(0, BLOCK_Q)).to(tl.int64)
            near = o_s < end
            if AXES > 0:
                gap = tl.zeros((BLOCK_Q,), tl.float64)
                for axis in tl.static_range(AXES):
                    other = tl.load(position_ptr + o_s * AXES + axis, mask=near, other=0.0)
                    side = tl.load(own_ptr + query.to(tl.int64) * AXES + axis) - other
                    gap += side * side
                near = near & (gap <= square)
            if tl.sum(near.to(tl.int32), 0) > 0:
                o_x = tl.load(row_ptr + o_s, mask=near, other=0)
                cost = candidate_cost(
                    q_ptr, x_ptr, inverse_unit, query, o_x, near, channels,
                    q_stride_n, q_stride_c, x_stride_n, x_stride_c, METRIC, BLOCK_Q, BLOCK_C,
                )  # fmt: skip
                usable = near
                doubtful = (tl.abs(cost) < float("inf")) ^ True
                if METRIC == COSINE:  # a row that is not finite costs 1 (NaN) or 0 (infinity)
                    doubtful = doubtful | (cost == 1.0) | (cost == 0.0)
                if tl.sum((near & doubtful).to(tl.int32), 0) > 0:
                    usable = near & row_is_finite(x_ptr, o_x, near, channels, x_stride_n, x_stride_c, BLOCK_Q, BLOCK_C)
                key = tl.where(usable, (ordered_bits(cost).to(tl.int64) << 32) | o_x.to(tl.int64), NOTHING)
                least = tl.min(key, 0)
                while least < worst:
                    last = tl.min(tl.where(kept == worst, o_k, KEPT), 0)
                    kept = tl.where(o_k == last, least, kept)
                    worst = tl.max(kept, 0)
                    key = tl.where(key == least, NOTHING, key)
                    least = tl.min(key, 0)
    tl.store(key_ptr + query.to(tl.int64) * k + o_k, kept, mask=o_k < k)


def launch(
    queries: torch.Tensor, database: torch.Tensor, query_positions: torch.Tensor, positions: torch.Tensor,
    rows: torch.Tensor, ranges: torch.Tensor, k: int, radius: float, metric: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Distances [n, k] float32 and indices [n, k] int32; the contract is that of the op's reference."""
    n, device = queries.shape[0], queries.device
    with torch.cuda.device_of(queries):
        distances = torch.empty(n, k, dtype=torch.float32, device=device)
        indices = torch.empty(n, k, dtype=torch.int32, device=device)
        if n == 0 or database.shape[0] == 0:
            return distances.fill_(-torch.inf if metric == "dot" else torch.inf), indices.fill_(-1)
        unit = choose_frame(database, centred=METRICS[metric] == 0).unit
        square = torch.full((1,), radius * radius, dtype=torch.float64, device=device)
        keys = torch.empty(n, k, dtype=torch.int64, device=device)
        walk_kernel[(n,)](
            queries, database, unit, query_positions.contiguous(), positions.contiguous(), square, rows.contiguous(),
            ranges.contiguous(), keys, queries.shape[1], ranges.shape[1], k, *queries.stride(), *database.stride(),
            METRIC=METRICS[metric], AXES=positions.shape[1], KEPT=max(16, triton.next_power_of_2(k)),
            BLOCK_Q=BLOCK_Q, BLOCK_C=BLOCK_C, num_warps=NUM_WARPS,
        )  # fmt: skip
        unpack_keys(keys.sort(1).values, metric, unit, distances, indices)
    return distances, indices


STATIC = [
    StaticKernel(
        walk_kernel,
        pointers={
            "q_ptr": dtype, "x_ptr": dtype, "own_ptr": "*fp64", "position_ptr": "*fp64", "square_ptr": "*fp64",
            "row_ptr": "*i32", "range_ptr": "*i32", "key_ptr": "*i64",
        },
        constants={
            "METRIC": METRICS[metric], "AXES": axes, "KEPT": kept, "BLOCK_Q": BLOCK_Q, "BLOCK_C": BLOCK_C,
            "q_stride_c": 1, "x_stride_c": 1,
        },
        num_warps=NUM_WARPS,
    )
    for dtype, metric, axes, kept in (("*fp32", "l2", 2, 16), ("*bf16", "cosine", 3, 16), ("*fp32", "dot", 0, 1024))
]  # fmt: skip
