"""The kernels of knn on the GPU; `_triton.py` says how they work together."""

import triton
import triton.language as tl

from planmill.kernels.common.triton_screen import proven_error, tile_products
from planmill.kernels.common.triton_search import direct_cost

DOT, COSINE = tl.constexpr(1), tl.constexpr(2)
NOTHING = tl.constexpr(9223372036854775807)  # the key of an empty slot
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def rank_tile(
    q_hi_ptr, q_lo_ptr, q_descale_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr, row_tile, queries, tile,
    rows, k_tiles, first_query, first_row, SPLIT: tl.constexpr, EXCLUDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Ranks [queries, rows], smaller is nearer; inf where a row is masked, not finite or the query itself."""
    o_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < queries, o_n < rows
    acc = tile_products(q_hi_ptr, q_lo_ptr, x_hi_ptr, x_lo_ptr, row_tile * BLOCK_M, m_m, tile * BLOCK_N, m_n, k_tiles,
                        SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    q_descale = tl.load(q_descale_ptr + o_m, mask=m_m, other=0.0)
    x_descale = tl.load(x_descale_ptr + o_n, mask=m_n, other=0.0)
    x_half_norm = tl.load(x_half_norm_ptr + o_n, mask=m_n, other=float("inf"))
    rank = x_half_norm[None, :] - acc * q_descale[:, None] * x_descale[None, :]
    if EXCLUDE:
        rank = tl.where((first_query + o_m)[:, None] == (first_row + o_n)[None, :], float("inf"), rank)
    return rank


@triton.jit(do_not_specialize=["queries", "rows", "k_tiles", "first_query", "first_row", "groups", "splits"])
def group_kernel(
    q_hi_ptr, q_lo_ptr, q_descale_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr, table_ptr,
    queries, rows, k_tiles, first_query, first_row, groups, splits,
    SPLIT: tl.constexpr, EXCLUDE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """table[query, group] = smallest rank of GROUP consecutive rows; `groups`: width of the table."""
    row_tile = tl.program_id(0) // splits
    o_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < queries
    for tile in range(tl.program_id(0) % splits, (rows + BLOCK_N - 1) // BLOCK_N, splits):
        rank = rank_tile(q_hi_ptr, q_lo_ptr, q_descale_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr,
                         row_tile, queries, tile, rows, k_tiles, first_query, first_row,
                         SPLIT, EXCLUDE, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        least = tl.min(tl.reshape(rank, (BLOCK_M, BLOCK_N // GROUP, GROUP)), 2)
        o_g = (first_row + tile * BLOCK_N) // GROUP + tl.arange(0, BLOCK_N // GROUP)
        mask = m_m[:, None] & (o_g < groups)[None, :]
        tl.store(table_ptr + o_m.to(tl.int64)[:, None] * groups + o_g[None, :], least, mask=mask)


@triton.jit(do_not_specialize=["queries", "rows", "k_tiles", "first_query", "first_row", "slots", "splits", "rounding"])
def filter_kernel(
    q_hi_ptr, q_lo_ptr, q_descale_ptr, q_length_ptr, q_residual_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr,
    x_descale_ptr, bound_ptr, x_longest_ptr, x_roughest_ptr, count_ptr, slot_ptr,
    queries, rows, k_tiles, first_query, first_row, slots, splits, rounding,
    SPLIT: tl.constexpr, EXCLUDE: tl.constexpr, EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Append to slot[query] the rows whose rank is within the bound and twice the error; count may pass `slots`."""
    row_tile = tl.program_id(0) // splits
    o_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < queries
    bound = tl.load(bound_ptr + o_m, mask=m_m, other=float("-inf"))
    if EXACT:
        q_length = tl.load(q_length_ptr + o_m, mask=m_m, other=0.0)
        q_rest = tl.load(q_residual_ptr + o_m, mask=m_m, other=0.0)
        bound += 2.02 * proven_error(q_length, q_rest, tl.load(x_longest_ptr), tl.load(x_roughest_ptr), rounding)
    for tile in range(tl.program_id(0) % splits, (rows + BLOCK_N - 1) // BLOCK_N, splits):
        rank = rank_tile(q_hi_ptr, q_lo_ptr, q_descale_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr,
                         row_tile, queries, tile, rows, k_tiles, first_query, first_row,
                         SPLIT, EXCLUDE, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        kept = ((rank <= bound[:, None]) & (rank < float("inf"))).to(tl.int32)
        kept_of_row = tl.sum(kept, 1)
        if tl.sum(kept_of_row, 0) > 0:
            first = tl.atomic_add(count_ptr + o_m, kept_of_row, mask=kept_of_row > 0, sem="relaxed")
            position = first[:, None] + tl.cumsum(kept, 1) - 1
            p_slot = slot_ptr + o_m.to(tl.int64)[:, None] * slots + position
            o_n = first_row + tile * BLOCK_N + tl.arange(0, BLOCK_N)
            index = tl.zeros((BLOCK_M, BLOCK_N), tl.int32) + o_n[None, :]
            tl.store(p_slot, index, mask=(kept > 0) & (position < slots))


@triton.jit
def ordered_bits(cost):
    """float32 -> int32 of the same order."""
    bits = tl.where(cost == 0.0, 0.0, cost).to(tl.int32, bitcast=True)  # -0 is 0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def candidate_cost(
    q_ptr, x_ptr, inverse_unit, query, o_x, m_x, channels, q_stride_n, q_stride_c, x_stride_n, x_stride_c,
    METRIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_Q]: cost of rows o_x for one query, evaluated in float32; smaller is nearer."""
    o_q = tl.zeros((BLOCK_Q,), tl.int32) + query
    if METRIC != COSINE:
        return direct_cost(q_ptr, x_ptr, inverse_unit, o_q, m_x, o_x, m_x, 2147483647, 2147483647, channels,
                           0, q_stride_n, q_stride_c, 0, x_stride_n, x_stride_c,
                           METRIC == DOT, BLOCK_Q, BLOCK_C)  # fmt: skip
    dot = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    q2 = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    x2 = tl.zeros((BLOCK_Q, BLOCK_C), tl.float32)
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        mask = m_x[:, None] & (o_c < channels)[None, :]
        p_q = q_ptr + o_q.to(tl.int64)[:, None] * q_stride_n + o_c.to(tl.int64)[None, :] * q_stride_c
        p_x = x_ptr + o_x.to(tl.int64)[:, None] * x_stride_n + o_c.to(tl.int64)[None, :] * x_stride_c
        q = tl.load(p_q, mask=mask, other=0.0).to(tl.float32) * inverse_unit
        x = tl.load(p_x, mask=mask, other=0.0).to(tl.float32) * inverse_unit
        dot += q * x
        q2 += q * q
        x2 += x * x
    lengths = tl.sqrt(tl.sum(q2, 1)) * tl.sqrt(tl.sum(x2, 1))
    cosine = tl.where(lengths > 0.0, tl.sum(dot, 1) / lengths, 0.0)
    return tl.maximum(1.0 - cosine, 0.0)


@triton.jit(do_not_specialize=["first_query", "slots", "blocks"])
def evaluate_kernel(
    q_ptr, x_ptr, unit_ptr, q_half_norm_ptr, count_ptr, slot_ptr, key_ptr, first_query, channels, slots, blocks,
    q_stride_n, q_stride_c, x_stride_n, x_stride_c,
    METRIC: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """key[query, slot] = (cost, index) of the candidate in 64 bits that sort as the pair; NOTHING in empty slots."""
    local = tl.program_id(0) // blocks
    o_slot = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    usable = tl.load(q_half_norm_ptr + local) < float("inf")
    filled = tl.where(usable, tl.load(count_ptr + local), 0)
    m_slot = (o_slot < filled) & (o_slot < slots)
    p_row = local.to(tl.int64) * slots
    key = tl.full((BLOCK_Q,), NOTHING, tl.int64)
    if tl.program_id(0) % blocks * BLOCK_Q < filled:
        index = tl.load(slot_ptr + p_row + o_slot, mask=m_slot, other=0)
        cost = candidate_cost(q_ptr, x_ptr, 1.0 / tl.load(unit_ptr), first_query + local, index, m_slot, channels,
                              q_stride_n, q_stride_c, x_stride_n, x_stride_c, METRIC, BLOCK_Q, BLOCK_C)  # fmt: skip
        key = tl.where(m_slot, (ordered_bits(cost).to(tl.int64) << 32) | index.to(tl.int64), key)
    tl.store(key_ptr + p_row + o_slot, key, mask=o_slot < slots)


@triton.jit
def kth_bits(p_scratch, rows, k, SCAN: tl.constexpr):
    """Smallest v such that at least k keys are <= v, or the largest finite key; by bisection of 32 bits."""
    zero = rows.to(tl.int64) * 0
    low, high = zero - 2147483648, zero + INFINITE - 1
    for _ in range(32):
        middle = (low + high) >> 1
        below = 0
        for start in range(0, rows, SCAN):
            o_x = start + tl.arange(0, SCAN)
            bits = tl.load(p_scratch + o_x, mask=o_x < rows, other=INFINITE)
            below += tl.sum((bits.to(tl.int64) <= middle).to(tl.int32), 0)
        enough = below >= k
        high = tl.where(enough, middle, high)
        low = tl.where(enough, low, tl.minimum(middle + 1, high))
    return high.to(tl.int32)


@triton.jit(do_not_specialize=["first_query", "queries", "rows", "slots", "k", "programs"])
def exhaust_kernel(
    q_ptr, x_ptr, unit_ptr, q_half_norm_ptr, x_half_norm_ptr, count_ptr, scratch_ptr, key_ptr, first_query, queries,
    rows, channels, slots, k, programs, q_stride_n, q_stride_c, x_stride_n, x_stride_c,
    METRIC: tl.constexpr, EXCLUDE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """Queries with more candidates than slots: costs of the whole database to scratch, then the k smallest as keys."""
    p_scratch = scratch_ptr + tl.program_id(0).to(tl.int64) * rows
    for local in range(tl.program_id(0), queries, programs):
        if (tl.load(count_ptr + local) > slots) & (tl.load(q_half_norm_ptr + local) < float("inf")):
            for start in range(0, rows, BLOCK_Q):
                o_x = start + tl.arange(0, BLOCK_Q)
                m_x = o_x < rows
                cost = candidate_cost(q_ptr, x_ptr, 1.0 / tl.load(unit_ptr), first_query + local, o_x, m_x, channels,
                                      q_stride_n, q_stride_c, x_stride_n, x_stride_c,
                                      METRIC, BLOCK_Q, BLOCK_C)  # fmt: skip
                usable = tl.load(x_half_norm_ptr + o_x, mask=m_x, other=float("inf")) < float("inf")
                if EXCLUDE:
                    usable = usable & (o_x != first_query + local)
                tl.store(p_scratch + o_x, tl.where(usable, ordered_bits(cost), INFINITE), mask=m_x)
            tl.debug_barrier()
            last = kth_bits(p_scratch, rows, k, SCAN)
            below = 0
            for start in range(0, rows, SCAN):
                o_x = start + tl.arange(0, SCAN)
                bits = tl.load(p_scratch + o_x, mask=o_x < rows, other=INFINITE)
                below += tl.sum((bits < last).to(tl.int32), 0)
            ties, written = 0, 0
            for start in range(0, rows, SCAN):
                o_x = start + tl.arange(0, SCAN)
                bits = tl.load(p_scratch + o_x, mask=o_x < rows, other=INFINITE)
                tied = (bits == last).to(tl.int32)
                kept = ((bits < last) | ((tied > 0) & (ties + tl.cumsum(tied, 0) <= k - below))).to(tl.int32)
                p_key = key_ptr + tl.cast(slots, tl.int64) * local + written + tl.cumsum(kept, 0) - 1
                tl.store(p_key, (bits.to(tl.int64) << 32) | o_x.to(tl.int64), mask=kept > 0)
                ties += tl.sum(tied, 0)
                written += tl.sum(kept, 0)
            for start in range(0, slots, SCAN):
                o_slot = start + tl.arange(0, SCAN)
                empty = (o_slot >= written) & (o_slot < slots)
                tl.store(key_ptr + tl.cast(slots, tl.int64) * local + o_slot, NOTHING, mask=empty)
            tl.debug_barrier()
