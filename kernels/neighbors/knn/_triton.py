"""Exact k nearest neighbours on the GPU: two walks over tile products, then a second look in float32.

1. `group_kernel`: ranks of a tile on the tensor cores, minima of groups of rows -> table [n, groups]. The k-th smallest
   group minimum bounds the k-th smallest rank: k groups hold a row at least that good.
2. `filter_kernel`: the same products; every row whose rank is within that bound plus twice the proven error of the
   products is a candidate. Slots are handed out by an integer atomic; their order does not matter, step 3 sorts.
3. `evaluate_kernel`: candidates are evaluated directly in float32 (differences for distances) and packed as
   (cost, index) in 64 bits; the k smallest are the answer, ties to the lower index.

Where a row has more candidates than slots (long runs of equal or nearly equal rows), `exhaust_kernel` evaluates the whole
database for it: slower, never wrong. `exact=False` keeps 11 bits and adds no error to the bound; its distances are evaluated
in float32 all the same.

Memory beyond inputs and outputs: at most 32 MiB of encoded database, taken in chunks, and 24 MiB for a slab of queries,
their table and their candidates. Nothing waits for the device: a call can be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_screen import BLOCK_K, Encoded, Frame, choose_frame, encode, tile_products
from planmill.kernels.common.triton_search import direct_cost, processors

BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES = 128, 64, 8, 3
BLOCK_Q, BLOCK_C = 32, 128  # candidates and channels that one program of evaluate_kernel holds
SCAN = 1024  # keys that one step of exhaust_kernel holds
DATABASE_BYTES, SLAB_BYTES, SCRATCH_BYTES = 32 << 20, 16 << 20, 8 << 20
DOT, COSINE = tl.constexpr(1), tl.constexpr(2)
METRICS = {"l2": 0, "l2sq": 0, "dot": 1, "cosine": 2}
NOTHING = tl.constexpr(9223372036854775807)
INFINITE = tl.constexpr(0x7F800000)


@triton.jit
def rank_tile(
    q_hi_ptr, q_lo_ptr, q_descale_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr, row_tile, queries, tile, rows,
    k_tiles, first_query, first_row, SPLIT: tl.constexpr, EXCLUDE: tl.constexpr,
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
        x_length, x_rest = tl.load(x_longest_ptr), tl.load(x_roughest_ptr)
        reach = x_length + x_rest
        error = (q_length + reach) * x_rest + q_rest * reach + rounding * q_length * x_length
        bound += 2.02 * (error + 1e-6 * x_length * x_length)
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
                           0, q_stride_n, q_stride_c, 0, x_stride_n, x_stride_c, METRIC == DOT, BLOCK_Q, BLOCK_C)  # fmt: skip
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
    low, high = -2147483648, INFINITE - 1
    for _ in range(32):
        middle = (low.to(tl.int64) + high.to(tl.int64)) >> 1
        below = 0
        for start in range(0, rows, SCAN):
            o_x = start + tl.arange(0, SCAN)
            bits = tl.load(p_scratch + o_x, mask=o_x < rows, other=INFINITE)
            below += tl.sum((bits.to(tl.int64) <= middle).to(tl.int32), 0)
        enough = below >= k
        high = tl.where(enough, middle, high).to(tl.int32)
        low = tl.where(enough, low, tl.minimum(middle + 1, high)).to(tl.int32)
    return high


@triton.jit(do_not_specialize=["first_query", "queries", "rows", "slots", "k", "programs"])
def exhaust_kernel(
    q_ptr, x_ptr, unit_ptr, q_half_norm_ptr, x_half_norm_ptr, count_ptr, scratch_ptr, key_ptr, first_query, queries, rows,
    channels, slots, k, programs, q_stride_n, q_stride_c, x_stride_n, x_stride_c,
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
                                      q_stride_n, q_stride_c, x_stride_n, x_stride_c, METRIC, BLOCK_Q, BLOCK_C)  # fmt: skip
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
                p_key = key_ptr + local.to(tl.int64) * slots + written + tl.cumsum(kept, 0) - 1
                tl.store(p_key, (bits.to(tl.int64) << 32) | o_x.to(tl.int64), mask=kept > 0)
                ties += tl.sum(tied, 0)
                written += tl.sum(kept, 0)
            for start in range(0, slots, SCAN):
                o_slot = start + tl.arange(0, SCAN)
                empty = (o_slot >= written) & (o_slot < slots)
                tl.store(key_ptr + local.to(tl.int64) * slots + o_slot, NOTHING, mask=empty)
            tl.debug_barrier()


@dataclass(frozen=True)
class Plan:
    """Sizes of one call: `group` rows share an entry of the table (0: all rows are candidates), `slots` candidates."""

    group: int
    groups: int
    slots: int
    slab: int
    chunk: int
    splits: int
    programs: int


def plan_search(queries: torch.Tensor, database: torch.Tensor, k: int, split: bool) -> Plan:
    """Choose the sizes so that the workspace stays within the limits above."""
    (n, channels), m = queries.shape, database.shape[0]
    group = 0
    if m > 4 * k and m > 256:
        group = min(32, 1 << ((m // (4 * k)).bit_length() - 1))
    groups = triton.cdiv(m, group) if group else 0
    slots = max(128, 2 * k) if group else max(m, k)
    encoded = triton.cdiv(max(channels, 1), BLOCK_K[split]) * BLOCK_K[split] * (4 if split else 2)
    slab = SLAB_BYTES // (encoded + 4 * groups + 28 * slots)
    slab = min(n, max(BLOCK_M, slab // BLOCK_M * BLOCK_M))
    chunk = min(m, max(1024, DATABASE_BYTES // encoded // 1024 * 1024))
    splits = min(triton.cdiv(chunk, BLOCK_N), max(1, 2 * processors(queries) // triton.cdiv(slab, BLOCK_M)))
    programs = min(slab, 2 * processors(queries), max(1, SCRATCH_BYTES // (4 * m)))
    return Plan(group, groups, slots, slab, chunk, splits, programs)


@dataclass(frozen=True)
class Bank:
    """The database as it is walked over: chunks are encoded when they are needed, one at a time."""

    database: torch.Tensor
    frame: Frame
    plan: Plan
    options: dict
    half_norm: torch.Tensor  # [m]
    longest: torch.Tensor  # [1]
    roughest: torch.Tensor  # [1]
    whole: list[Encoded]  # the only chunk, kept, where there is one

    def chunk(self, first: int) -> Encoded:
        """Rows from `first` on, encoded; what the proof needs of them is noted."""
        rows = min(self.plan.chunk, self.database.shape[0] - first)
        if self.whole:
            return self.whole[0]
        x = encode(self.database, self.frame, first=first, rows=rows, **self.options)
        self.half_norm[first : first + rows] = x.half_norm
        torch.maximum(self.longest, x.length.amax(0, keepdim=True), out=self.longest)
        torch.maximum(self.roughest, x.residual.amax(0, keepdim=True), out=self.roughest)
        if rows == self.database.shape[0]:
            self.whole.append(x)
        return x


def _candidates(
    bank: Bank, q: Encoded, first_query: int, k: int, exclude_self: bool, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Count [queries] and row [queries, slots] of the candidates of a slab of encoded queries."""
    plan, device = bank.plan, bank.database.device
    n, m = q.hi.shape[0], bank.database.shape[0]
    grid = (triton.cdiv(n, BLOCK_M) * plan.splits,)
    tile = {"SPLIT": q.split, "EXCLUDE": exclude_self, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[q.split],
            "num_warps": NUM_WARPS, "num_stages": NUM_STAGES}  # fmt: skip
    bound = torch.full((n,), torch.inf, dtype=torch.float32, device=device)
    if plan.group:
        table = torch.empty(n, plan.groups, dtype=torch.float32, device=device)
        for first in range(0, m, plan.chunk):
            x = bank.chunk(first)
            group_kernel[grid](
                q.hi, q.lo, q.descale, x.hi, x.lo, x.half_norm, x.descale, table, n, x.hi.shape[0], q.k_tiles,
                first_query, first, plan.groups, plan.splits, GROUP=plan.group, **tile,
            )  # fmt: skip
        bound = table.kthvalue(k, 1).values
        del table
    count = torch.zeros(n, dtype=torch.int32, device=device)
    slot = torch.empty(n, plan.slots, dtype=torch.int32, device=device)
    for first in range(0, m, plan.chunk):
        x = bank.chunk(first)
        filter_kernel[grid](
            q.hi, q.lo, q.descale, q.length, q.residual, x.hi, x.lo, x.half_norm, x.descale, bound, bank.longest,
            bank.roughest, count, slot, n, x.hi.shape[0], q.k_tiles, first_query, first, plan.slots, plan.splits,
            q.rounding, EXACT=exact, **tile,
        )  # fmt: skip
    return count, slot


def _unpack(
    keys: torch.Tensor, metric: str, unit: torch.Tensor, distances: torch.Tensor, indices: torch.Tensor
) -> None:
    """Write the distances and indices of sorted keys [n, k]."""
    bits = (keys >> 32).to(torch.int32)
    cost = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
    if metric == "l2":
        cost = cost.sqrt() * unit
    elif metric == "l2sq":
        cost = cost * unit * unit
    nothing = keys == NOTHING.value
    distances.copy_(torch.where(nothing, torch.inf, cost))
    if metric == "dot":
        distances.neg_()
    indices.copy_(torch.where(nothing, -1, keys & 0xFFFFFFFF))


def launch(
    queries: torch.Tensor, database: torch.Tensor, k: int, metric: str, exclude_self: bool, exact: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [n, k] float32 and indices [n, k] int32; the contract is that of `find_neighbors`."""
    n, m, device = queries.shape[0], database.shape[0], queries.device
    with torch.cuda.device_of(queries):
        distances = torch.empty(n, k, dtype=torch.float32, device=device)
        indices = torch.empty(n, k, dtype=torch.int32, device=device)
        if n == 0 or m == 0:
            return distances.fill_(-torch.inf if metric == "dot" else torch.inf), indices.fill_(-1)
        distance = METRICS[metric] == 0
        split = exact and (queries.dtype == torch.float32 or metric == "cosine")
        options = {"split": split, "norms": distance, "normalize": metric == "cosine"}
        frame, plan = choose_frame(database, centred=distance), plan_search(queries, database, k, split)
        bank = Bank(database, frame, plan, options, torch.empty(m, device=device), torch.zeros(1, device=device),
                    torch.zeros(1, device=device), [])  # fmt: skip
        scratch = torch.empty(plan.programs * m, dtype=torch.int32, device=device)
        if not plan.group and plan.chunk < m:  # the bounds of every chunk are needed before the first is filtered
            for first in range(0, m, plan.chunk):
                bank.chunk(first)
        for first in range(0, n, plan.slab):
            q = encode(queries, frame, first=first, rows=min(plan.slab, n - first), **options)
            count, slot = _candidates(bank, q, first, k, exclude_self, exact)
            keys = _evaluate(queries, bank, q, first, count, slot, scratch, k, metric, exclude_self)
            stop = first + q.hi.shape[0]
            _unpack(keys.sort(1).values[:, :k], metric, frame.unit, distances[first:stop], indices[first:stop])
    return distances, indices


def _evaluate(
    queries: torch.Tensor, bank: Bank, q: Encoded, first: int, count: torch.Tensor, slot: torch.Tensor,
    scratch: torch.Tensor, k: int, metric: str, exclude_self: bool,
) -> torch.Tensor:  # fmt: skip
    """Keys [queries, slots] of the candidates."""
    plan, database, n = bank.plan, bank.database, q.hi.shape[0]
    keys = torch.empty(slot.shape, dtype=torch.int64, device=slot.device)
    blocks = triton.cdiv(plan.slots, BLOCK_Q)
    strides = (*queries.stride(), *database.stride())
    tile = {"METRIC": METRICS[metric], "BLOCK_Q": BLOCK_Q, "BLOCK_C": BLOCK_C, "num_warps": 4}
    evaluate_kernel[(n * blocks,)](
        queries, database, bank.frame.unit, q.half_norm, count, slot, keys, first, queries.shape[1], plan.slots, blocks,
        *strides, **tile,
    )  # fmt: skip
    if plan.group:
        exhaust_kernel[(plan.programs,)](
            queries, database, bank.frame.unit, q.half_norm, bank.half_norm, count, scratch, keys, first, n,
            database.shape[0], queries.shape[1], plan.slots, k, plan.programs, *strides, EXCLUDE=exclude_self, SCAN=SCAN, **tile,
        )  # fmt: skip
    return keys


def _static_products() -> list[StaticKernel]:
    halves = {name: "*fp16" for name in ("q_hi_ptr", "q_lo_ptr", "x_hi_ptr", "x_lo_ptr")}
    made = []
    for split, exclude, group in ((True, False, 32), (True, True, 1), (False, False, 8)):
        tile = {"SPLIT": split, "EXCLUDE": exclude, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[split]}
        for kernel, own in ((group_kernel, {"GROUP": group}), (filter_kernel, {"EXACT": split})):
            made.append(
                StaticKernel(
                    kernel,
                    pointers={**halves, **({"count_ptr": "*i32", "slot_ptr": "*i32"} if "EXACT" in own else {})},
                    scalars={"rounding": "fp32"},
                    constants={**tile, **own},
                    num_warps=NUM_WARPS,
                    num_stages=NUM_STAGES,
                    tensor_core=True,
                )
            )
    return made


def _static_selection() -> list[StaticKernel]:
    buffers = {"count_ptr": "*i32", "slot_ptr": "*i32", "key_ptr": "*i64", "scratch_ptr": "*i32"}
    tile = {"BLOCK_Q": BLOCK_Q, "BLOCK_C": BLOCK_C, "q_stride_c": 1, "x_stride_c": 1}
    made = []
    for dtype, metric in (("*fp32", "l2"), ("*bf16", "dot"), ("*fp32", "cosine")):
        pointers = {**buffers, "q_ptr": dtype, "x_ptr": dtype}
        constants = {**tile, "METRIC": METRICS[metric]}
        made.append(StaticKernel(evaluate_kernel, pointers=pointers, constants=constants))
        constants = {**constants, "EXCLUDE": metric == "l2", "SCAN": SCAN}
        made.append(StaticKernel(exhaust_kernel, pointers=pointers, constants=constants))
    return made


STATIC = [*_static_products(), *_static_selection()]
