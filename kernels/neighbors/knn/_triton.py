"""Exact k nearest neighbours on the GPU: two walks over tile products, then a second look in float32.

1. `group_kernel`: ranks of a tile on the tensor cores, minima of groups of rows -> table [n, groups]. The k-th smallest
   group minimum bounds the k-th smallest rank: k groups hold a row at least that good.
2. `filter_kernel`: the same products; every row whose rank is within that bound plus twice the proven error of the
   products is a candidate. Slots are handed out by an integer atomic; their order does not matter, step 3 sorts.
3. `evaluate_kernel`: candidates are evaluated directly in float32 (differences for distances) and packed as
   (cost, index) in 64 bits; the k smallest are the answer, ties to the lower index.

Where a row has more candidates than slots (long runs of equal or nearly equal rows), `exhaust_kernel` evaluates the
whole database for it: slower, never wrong. `exact=False` keeps 11 bits and adds no error to the bound; its distances
are evaluated in float32 all the same.

Memory beyond inputs and outputs: at most 32 MiB of encoded database, taken in chunks, and 24 MiB for a slab of queries,
their table and their candidates. Nothing waits for the device: a call can be captured in a CUDA graph.
"""

from dataclasses import dataclass

import torch
import triton

from planmill.kernels.common.sizes import slabs, tuned_for
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, StaticKernel
from planmill.kernels.common.triton_match import processors
from planmill.kernels.common.triton_screen import BLOCK_K, Encoded, Frame, choose_frame, encode
from planmill.kernels.neighbors.knn._triton_kernels import (
    NOTHING,
    evaluate_kernel,
    exhaust_kernel,
    filter_kernel,
    group_kernel,
)

BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES = 128, 64, 8, 3
BLOCK_Q, BLOCK_C = 32, 128  # candidates and channels that one program of evaluate_kernel holds
SCAN = 1024  # keys that one step of exhaust_kernel holds
DATABASE_BYTES, SLAB_BYTES, SCRATCH_BYTES = 32 << 20, 16 << 20, 8 << 20
METRICS = {"l2": 0, "l2sq": 0, "dot": 1, "cosine": 2}


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
    splits = min(triton.cdiv(chunk, BLOCK_N), max(1, 2 * processors(queries) // triton.cdiv(tuned_for(slab), BLOCK_M)))
    programs = min(tuned_for(slab), 2 * processors(queries), max(1, SCRATCH_BYTES // (4 * m)))
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
    tile = {"SPLIT": q.split, "EXCLUDE": exclude_self, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N,
            "BLOCK_K": BLOCK_K[q.split], "num_warps": NUM_WARPS, "num_stages": NUM_STAGES}  # fmt: skip
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


def unpack_keys(
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
        for first, rows in slabs(n, plan.slab):
            q = encode(queries, frame, first=first, rows=rows, **options)
            count, slot = _candidates(bank, q, first, k, exclude_self, exact)
            keys = _evaluate(queries, bank, q, first, count, slot, scratch, k, metric, exclude_self)
            stop = first + q.hi.shape[0]
            unpack_keys(keys.sort(1).values[:, :k], metric, frame.unit, distances[first:stop], indices[first:stop])
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
            database.shape[0], queries.shape[1], plan.slots, k, plan.programs, *strides,
            EXCLUDE=exclude_self, SCAN=SCAN, **tile,
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
                    targets=PRODUCT_TARGETS,
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
