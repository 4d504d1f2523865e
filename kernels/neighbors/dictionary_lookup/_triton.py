"""Sparse dictionary lookup on the GPU: products into a slab, a threshold per row, a gather of what is above it.

1. `score_kernel`: products of queries and keys on the tensor cores, float32 as two float16 (22 bits), into a slab
   [rows, m]. Keys are shifted by a value near their mean: that adds the same to all scores of a query and changes no
   weight.
2. `threshold_kernel`, one program a row: Newton's iteration for tau from below, as on the CPU, over a row that lies in
   the L2 cache; then the atoms above tau, in order, as a list.
3. `mix_kernel`: the values of the listed atoms, weighted. Rows of values that are not chosen are not read.

A result does not depend on the other queries. Memory beyond inputs and outputs: the keys as float16 operands, and
64 MiB of slab, lists and queries as operands, taken by as many queries as fit. Nothing waits for the device: a call can
be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.sizes import slabs
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, StaticKernel
from planmill.kernels.common.triton_screen import BLOCK_K, Frame, choose_frame, encode, tile_products
from planmill.kernels.neighbors.dictionary_lookup.reference import POWERS

BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES = 128, 64, 8, 3
SCAN = 1024  # scores that one step of threshold_kernel holds
BLOCK_A, BLOCK_D = 16, 128  # atoms and columns of values that one step of mix_kernel holds
SLAB_BYTES = 64 << 20
ROUNDS = tl.constexpr(48)  # of Newton's iteration; 18 are the most that was seen, up to a million scores


@triton.jit(do_not_specialize=["queries", "atoms", "tiles", "k_tiles"])
def score_kernel(
    q_hi_ptr, q_lo_ptr, q_half_norm_ptr, x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr, score_ptr,
    queries, atoms, tiles, k_tiles,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """score[query, atom] but for a factor a query; -inf where one of them is not finite."""
    row_tile, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    o_m = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < queries, o_n < atoms
    acc = tile_products(q_hi_ptr, q_lo_ptr, x_hi_ptr, x_lo_ptr, row_tile * BLOCK_M, m_m, tile * BLOCK_N, m_n, k_tiles,
                        SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
    descale = tl.load(x_descale_ptr + o_n, mask=m_n, other=0.0)
    unknown = tl.load(q_half_norm_ptr + o_m, mask=m_m, other=0.0)[:, None] == float("inf")
    unknown = unknown | (tl.load(x_half_norm_ptr + o_n, mask=m_n, other=0.0) == float("inf"))[None, :]
    score = tl.where(unknown, float("-inf"), acc * descale[None, :])
    p_score = score_ptr + o_m.to(tl.int64)[:, None] * atoms + o_n[None, :]
    tl.store(p_score, score, mask=m_m[:, None] & m_n[None, :])


@triton.jit
def relative(score, top, inverse_width):
    """(score - top) / width, at least -2: what lies below -1 has no weight. The width may be 0 or infinite."""
    y = tl.maximum((score - top) * inverse_width, -2.0)
    return tl.where(score >= top, 0.0, tl.where(score > float("-inf"), y, -2.0))


@triton.jit(do_not_specialize=["atoms", "scale"])
def threshold_kernel(
    score_ptr, q_descale_ptr, unit_ptr, list_ptr, count_ptr, top_ptr, tau_ptr, atoms, scale,
    POWER: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """The largest score, tau, and the atoms above tau, of one query."""
    row = tl.program_id(0)
    p_score = score_ptr + row.to(tl.int64) * atoms
    best = tl.full((SCAN,), float("-inf"), tl.float32)
    for start in range(0, atoms, SCAN):
        o_n = start + tl.arange(0, SCAN)
        best = tl.maximum(best, tl.load(p_score + o_n, mask=o_n < atoms, other=float("-inf")))
    top = tl.max(best, 0)
    inverse_width = tl.load(q_descale_ptr + row) * tl.load(unit_ptr) * scale / POWER
    tau, rounds = -1.0, 0
    while rounds < ROUNDS:
        total = tl.zeros((SCAN,), tl.float32)
        squares = tl.zeros((SCAN,), tl.float32)
        above = tl.zeros((SCAN,), tl.float32)
        for start in range(0, atoms, SCAN):
            o_n = start + tl.arange(0, SCAN)
            score = tl.load(p_score + o_n, mask=o_n < atoms, other=float("-inf"))
            over = tl.maximum(relative(score, top, inverse_width) - tau, 0.0)
            total += over
            squares += over * over
            above += tl.where(over > 0.0, 1.0, 0.0)
        if POWER == 1:
            following = tau + (tl.sum(total, 0) - 1.0) / tl.sum(above, 0)
        else:
            following = tau + (tl.sum(squares, 0) - 1.0) / (2.0 * tl.sum(total, 0))
        rounds = tl.where(following > tau, rounds + 1, ROUNDS)
        tau = tl.maximum(tau, following)
    if POWER == 1:  # -1 + (1 - 1/m) keeps of 1/m only what is above 2^-24: once more, from the atoms above
        tau = tl.minimum(tau, -2.98e-8)  # the largest stays above it
        total = tl.zeros((SCAN,), tl.float32)
        above = tl.zeros((SCAN,), tl.float32)
        for start in range(0, atoms, SCAN):
            o_n = start + tl.arange(0, SCAN)
            y = relative(tl.load(p_score + o_n, mask=o_n < atoms, other=float("-inf")), top, inverse_width)
            total += tl.where(y > tau, y, 0.0)
            above += tl.where(y > tau, 1.0, 0.0)
        tau = (tl.sum(total, 0) - 1.0) / tl.sum(above, 0)
    count = 0
    p_list = list_ptr + row.to(tl.int64) * atoms
    for start in range(0, atoms, SCAN):
        o_n = start + tl.arange(0, SCAN)
        score = tl.load(p_score + o_n, mask=o_n < atoms, other=float("-inf"))
        chosen = ((relative(score, top, inverse_width) > tau) & (score > float("-inf"))).to(tl.int32)
        tl.store(p_list + count + tl.cumsum(chosen, 0) - 1, o_n, mask=chosen > 0)
        count += tl.sum(chosen, 0)
    tl.store(count_ptr + row, count)
    tl.store(top_ptr + row, top)
    tl.store(tau_ptr + row, tau)


@triton.jit(do_not_specialize=["first", "atoms", "width", "blocks", "scale"])
def mix_kernel(
    score_ptr, q_descale_ptr, unit_ptr, list_ptr, count_ptr, top_ptr, tau_ptr, values_ptr, out_ptr,
    first, atoms, width, blocks, scale, stride_m, stride_c,
    POWER: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """BLOCK_D columns of the result of one query."""
    row = tl.program_id(0) // blocks
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    p_score, p_list = score_ptr + row.to(tl.int64) * atoms, list_ptr + row.to(tl.int64) * atoms
    count, top, tau = tl.load(count_ptr + row), tl.load(top_ptr + row), tl.load(tau_ptr + row)
    inverse_width = tl.load(q_descale_ptr + row) * tl.load(unit_ptr) * scale / POWER
    out = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, count, BLOCK_A):
        o_a = start + tl.arange(0, BLOCK_A)
        m_a = o_a < count
        atom = tl.load(p_list + o_a, mask=m_a, other=0)
        score = tl.load(p_score + atom, mask=m_a, other=float("-inf"))
        weight = tl.where(m_a, tl.maximum(relative(score, top, inverse_width) - tau, 0.0), 0.0)
        if POWER == 2:
            weight *= weight
        p_values = values_ptr + atom.to(tl.int64)[:, None] * stride_m + o_d.to(tl.int64)[None, :] * stride_c
        values = tl.load(p_values, mask=m_a[:, None] & m_d[None, :], other=0.0).to(tl.float32)
        out += tl.sum(weight[:, None] * values, 0)
    out += out - out  # infinity to NaN
    out = tl.where(count > 0, out, float("nan"))
    tl.store(out_ptr + (first + row).to(tl.int64) * width + o_d, out, mask=m_d)


def launch(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, weighting: str
) -> torch.Tensor:
    """[n, Dv], dtype of values; the contract is that of `lookup_dictionary`."""
    n, atoms, width, power = queries.shape[0], keys.shape[0], values.shape[1], POWERS[weighting]
    device = queries.device
    with torch.cuda.device_of(queries):
        out = torch.empty(n, width, dtype=values.dtype, device=device)
        if out.numel() == 0:
            return out
        split = queries.dtype == torch.float32
        frame = choose_frame(keys, centred=True)
        origin = Frame(torch.zeros_like(frame.centre), torch.ones_like(frame.unit))
        x = encode(keys, frame, split=split, norms=False)
        rows = min(n, max(1, SLAB_BYTES // (8 * atoms + 4 * keys.shape[1])))
        scores = torch.empty(rows * atoms, dtype=torch.float32, device=device)
        lists = torch.empty(rows * atoms, dtype=torch.int32, device=device)
        count = torch.empty(rows, dtype=torch.int32, device=device)
        top, tau = (torch.empty(rows, dtype=torch.float32, device=device) for _ in range(2))
        tiles, blocks = triton.cdiv(atoms, BLOCK_N), triton.cdiv(width, BLOCK_D)
        for first, some in slabs(n, rows):
            q = encode(queries, origin, split=split, norms=False, first=first, rows=some)
            score_kernel[(triton.cdiv(some, BLOCK_M) * tiles,)](
                q.hi, q.lo, q.half_norm, x.hi, x.lo, x.half_norm, x.descale, scores, some, atoms, tiles, q.k_tiles,
                SPLIT=split, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K[split],
                num_warps=NUM_WARPS, num_stages=NUM_STAGES,
            )  # fmt: skip
            shared = (scores, q.descale, frame.unit, lists, count, top, tau)
            threshold_kernel[(some,)](*shared, atoms, scale, POWER=power, SCAN=SCAN, num_warps=4)
            mix_kernel[(some * blocks,)](
                *shared, values, out, first, atoms, width, blocks, scale, *values.stride(),
                POWER=power, BLOCK_A=BLOCK_A, BLOCK_D=BLOCK_D, num_warps=4,
            )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    halves = {name: "*fp16" for name in ("q_hi_ptr", "q_lo_ptr", "x_hi_ptr", "x_lo_ptr")}
    lists = {"list_ptr": "*i32", "count_ptr": "*i32"}
    made = []
    for split, dtype, power in ((True, "*fp32", 1), (False, "*bf16", 2)):
        tile = {"SPLIT": split, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "BLOCK_K": BLOCK_K[split]}
        made += [
            StaticKernel(
                score_kernel,
                pointers=halves,
                constants=tile,
                num_warps=NUM_WARPS,
                num_stages=NUM_STAGES,
                tensor_core=True,
                targets=PRODUCT_TARGETS,
            ),
            StaticKernel(
                threshold_kernel,
                pointers=lists,
                scalars={"scale": "fp32"},
                constants={"POWER": power, "SCAN": SCAN},
            ),
            StaticKernel(
                mix_kernel,
                pointers={**lists, "values_ptr": dtype, "out_ptr": dtype},
                scalars={"scale": "fp32"},
                constants={"POWER": power, "BLOCK_A": BLOCK_A, "BLOCK_D": BLOCK_D, "stride_c": 1},
            ),
        ]
    return made


STATIC = _static()
