"""Matching on the GPU: an argmax in the epilogue of a matrix product; the n x m scores never leave the chip.

1. `encode_kernel`: the rows that the partition names, gathered and scaled by a power of two to float16 operands: exact
   for half-precision rows, 22 bits (hi + lo) for float32; and one over the length of what was stored.
2. `match_kernel`: a tile of sources against a run of destinations; best and where stay in registers.
3. `settle_kernel`: the runs in the order of the destinations, so that ties stay low.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.sizes import tuned_for
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, StaticKernel
from planmill.kernels.common.triton_match import processors
from planmill.kernels.common.triton_screen import BLOCK_K, load_row_tile, power_of_two, tile_products

BLOCK_M, BLOCK_N, NUM_WARPS, NUM_STAGES = 128, 64, 8, 3
BLOCK_R, BLOCK_C = 4, 256
SETTLE_ROWS = 256


@triton.jit(do_not_specialize=["rows", "listed", "tokens", "k_tiles"])
def encode_kernel(
    x_ptr, list_ptr, hi_ptr, lo_ptr, inverse_ptr, rows, listed, tokens, channels, k_tiles, stride_b, stride_n, stride_c,
    SPLIT: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Operands of `rows` = B * listed rows; inverse[row] = 1 / |operand|: 0 for a zero row, NaN where not finite."""
    o_out = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_rows = o_out < rows
    entry = o_out // listed
    o_rows = entry * tokens + tl.load(list_ptr + (o_out - entry * listed), mask=m_rows, other=0)
    largest = tl.zeros((BLOCK_R,), tl.float32)
    finite = m_rows
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        x = tl.abs(load_row_tile(x_ptr, o_rows, m_rows, o_c, tokens, channels, stride_b, stride_n, stride_c))
        good = x < float("inf")  # false for NaN
        finite = finite & (tl.min(good.to(tl.int32), 1) > 0)
        largest = tl.maximum(largest, tl.max(tl.where(good, x, 0.0), 1))
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -114)
    scale = power_of_two(12 - exponent)  # the largest entry lands in [2^12, 2^13)
    width = k_tiles * BLOCK_K
    squares = tl.zeros((BLOCK_R,), tl.float32)
    for begin in range(0, width, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        x = load_row_tile(x_ptr, o_rows, m_rows, o_c, tokens, channels, stride_b, stride_n, stride_c)
        x = tl.where(finite[:, None], x, 0.0) * scale[:, None]
        hi = x.to(tl.float16)
        p_out = o_out.to(tl.int64)[:, None] * width + o_c[None, :]
        m_out = m_rows[:, None] & (o_c < width)[None, :]
        tl.store(hi_ptr + p_out, hi, mask=m_out)
        stored = hi.to(tl.float32)
        if SPLIT:
            lo = (x - stored).to(tl.float16)
            tl.store(lo_ptr + p_out, lo, mask=m_out)
            stored += lo.to(tl.float32)
        squares += tl.sum(stored * stored, 1)
    inverse = tl.where(squares > 0.0, 1.0 / tl.sqrt(tl.where(squares > 0.0, squares, 1.0)), 0.0)
    tl.store(inverse_ptr + o_out, tl.where(finite, inverse, float("nan")), mask=m_rows)


@triton.jit(do_not_specialize=["sources", "destinations", "tiles", "splits", "k_tiles"])
def match_kernel(
    hi_ptr, lo_ptr, inverse_ptr, best_ptr, where_ptr, sources, destinations, tiles, splits, k_tiles,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """best and where [B, splits, n]: the largest similarity, but for the source's own length, in a run of dst."""
    program = tl.program_id(0)
    split = program % splits
    tile = (program // splits) % tiles
    entry = program // splits // tiles
    o_m = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < sources
    first = entry.to(tl.int64) * (sources + destinations)
    best = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    where = tl.full((BLOCK_M,), 0, tl.int32)
    columns = (destinations + BLOCK_N - 1) // BLOCK_N
    run = (columns + splits - 1) // splits
    for column in range(split * run, tl.minimum(split * run + run, columns)):
        o_n = column * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < destinations
        first_n = first + sources + column * BLOCK_N
        acc = tile_products(hi_ptr, lo_ptr, hi_ptr, lo_ptr, first + tile * BLOCK_M, m_m, first_n, m_n, k_tiles,
                            SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        inverse = tl.load(inverse_ptr + first + sources + o_n, mask=m_n, other=float("nan"))
        score = tl.where((inverse == inverse)[None, :], acc * inverse[None, :], float("-inf"))
        tile_best = tl.max(score, 1)
        tile_where = tl.min(tl.where(score == tile_best[:, None], o_n[None, :], 2147483647), 1)
        where = tl.where(tile_best > best, tile_where, where)
        best = tl.maximum(best, tile_best)
    p_out = (entry.to(tl.int64) * splits + split) * sources + o_m
    tl.store(best_ptr + p_out, best, mask=m_m)
    tl.store(where_ptr + p_out, where, mask=m_m)


@triton.jit(do_not_specialize=["sources", "listed", "splits", "blocks"])
def settle_kernel(
    inverse_ptr, best_ptr, where_ptr, similarity_ptr, position_ptr, sources, listed, splits, blocks,
    SETTLE_ROWS: tl.constexpr,
):  # fmt: skip
    """similarity and position [B, n] from the runs; NaN and 0 where nothing was found."""
    entry = tl.program_id(0) // blocks
    o_m = tl.program_id(0) % blocks * SETTLE_ROWS + tl.arange(0, SETTLE_ROWS)
    m_m = o_m < sources
    best = tl.full((SETTLE_ROWS,), float("-inf"), tl.float32)
    where = tl.full((SETTLE_ROWS,), 0, tl.int32)
    for split in range(splits):
        p_run = (entry.to(tl.int64) * splits + split) * sources + o_m
        run_best = tl.load(best_ptr + p_run, mask=m_m, other=float("-inf"))
        run_where = tl.load(where_ptr + p_run, mask=m_m, other=0)
        where = tl.where(run_best > best, run_where, where)
        best = tl.maximum(best, run_best)
    inverse = tl.load(inverse_ptr + entry.to(tl.int64) * listed + o_m, mask=m_m, other=0.0)
    found = (best > float("-inf")) & (inverse == inverse)
    p_out = entry.to(tl.int64) * sources + o_m
    tl.store(similarity_ptr + p_out, tl.where(found, best * inverse, float("nan")), mask=m_m)
    tl.store(position_ptr + p_out, tl.where(found, where, 0), mask=m_m)


def launch(metric: torch.Tensor, src: torch.Tensor, dst: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Similarity [B, n] float32 and position in `dst` [B, n] int32; the contract of the op."""
    batch, tokens, channels = metric.shape
    sources, destinations = src.shape[0], dst.shape[0]
    device = metric.device
    similarity = torch.empty(batch, sources, dtype=torch.float32, device=device)
    position = torch.empty(batch, sources, dtype=torch.int32, device=device)
    if similarity.numel() == 0:
        return similarity, position
    split = metric.dtype == torch.float32
    listed = sources + destinations
    k_tiles = triton.cdiv(max(channels, 1), BLOCK_K[split])
    hi = torch.empty(batch * listed, k_tiles * BLOCK_K[split], dtype=torch.float16, device=device)
    lo = torch.empty_like(hi) if split else hi
    inverse = torch.empty(batch * listed, dtype=torch.float32, device=device)
    tiles, blocks = triton.cdiv(sources, BLOCK_M), triton.cdiv(sources, SETTLE_ROWS)
    splits = min(16, triton.cdiv(destinations, BLOCK_N), max(1, 2 * processors(metric) // tuned_for(batch * tiles)))
    best = torch.empty(batch * splits * sources, dtype=torch.float32, device=device)
    where = torch.empty(batch * splits * sources, dtype=torch.int32, device=device)
    with torch.cuda.device_of(metric):
        encode_kernel[(triton.cdiv(batch * listed, BLOCK_R),)](
            metric, torch.cat([src, dst]), hi, lo, inverse, batch * listed, listed, tokens, channels, k_tiles,
            *metric.stride(), SPLIT=split, BLOCK_K=BLOCK_K[split], BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
        match_kernel[(batch * tiles * splits,)](
            hi, lo, inverse, best, where, sources, destinations, tiles, splits, k_tiles, SPLIT=split,
            BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K[split], num_warps=NUM_WARPS, num_stages=NUM_STAGES,
        )  # fmt: skip
        settle_kernel[(batch * blocks,)](
            inverse, best, where, similarity, position, sources, listed, splits, blocks,
            SETTLE_ROWS=SETTLE_ROWS, num_warps=4,
        )  # fmt: skip
    return similarity, position


def _static() -> list[StaticKernel]:
    indices = {"list_ptr": "*i32", "where_ptr": "*i32", "position_ptr": "*i32", "hi_ptr": "*fp16", "lo_ptr": "*fp16"}
    made = [StaticKernel(settle_kernel, indices, constants={"SETTLE_ROWS": SETTLE_ROWS})]
    for dtype, split in (("*fp32", True), ("*bf16", False)):
        tile = {"SPLIT": split, "BLOCK_K": BLOCK_K[split]}
        rows = {"BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "stride_c": 1}
        made += [
            StaticKernel(encode_kernel, {**indices, "x_ptr": dtype}, constants={**tile, **rows}),
            StaticKernel(match_kernel, indices, constants={**tile, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N},
                         num_warps=NUM_WARPS, num_stages=NUM_STAGES, tensor_core=True, targets=PRODUCT_TARGETS),
        ]  # fmt: skip
    return made


STATIC = _static()
