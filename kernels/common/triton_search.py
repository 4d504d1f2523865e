"""The nearest row of each segment, for every row of a set of images: tile products, then a proof or a second look.

`search` walks tiles of products on the tensor cores and keeps, per row and tile run, the best rank, where it is and
the second best. `settle` merges the runs, evaluates the winner directly in float32, and where the second best is closer
than the proven error of the products, every row of the segment: the result is the one of float32 arithmetic. Products
that nobody asks to be exact skip all of that but the merge.

The rank of row y for row x is |y|^2 / 2 - x.y (distances) or -x.y (inner products): smaller is better. In a symmetric
search (images against themselves) each unordered pair of images is visited once, and the minima of the columns come
from the same tile; they go to a workspace per tile row, so that no atomic is needed and every run gives the same bits.
"""

import triton
import triton.language as tl

from planmill.kernels.common.triton_screen import load_row_tile, proven_error, tile_products

NOWHERE = tl.constexpr(2147483647)


@triton.jit
def decode_pair(pair, images, segments, SYMMETRIC: tl.constexpr):
    """Pair number -> (image, segment); symmetric: all i < j of `images`, i changing slowly, two i folded into a row."""
    if SYMMETRIC:
        width = images - 1 + images % 2
        row = pair // width
        column = pair - row * width
        first = images - 1 - row
        folded = column >= first
        i = tl.where(folded, 2 * images - 2 - width - row, row)
        return i, tl.where(folded, i + 1 + column - first, row + 1 + column)
    i = pair // segments
    return i, pair - i * segments


@triton.jit
def near(o_x, o_y, limit, grid_width):
    """[rows, columns]: patches of the grid whose centres are at most sqrt(limit) apart."""
    dy = o_x[:, None] // grid_width - o_y[None, :] // grid_width
    dx = o_x[:, None] % grid_width - o_y[None, :] % grid_width
    return dy * dy + dx * dx <= limit


@triton.jit
def best_two(rank, o_index, AXIS: tl.constexpr):
    """Smallest rank along an axis, its lowest index, and the second smallest."""
    best = tl.min(rank, AXIS)
    index = tl.expand_dims(o_index, 1 - AXIS)
    where = tl.min(tl.where(rank == tl.expand_dims(best, AXIS), index, NOWHERE), AXIS)
    second = tl.min(tl.where(index == tl.expand_dims(where, AXIS), float("inf"), rank), AXIS)
    return best, where, second


@triton.jit
def store_columns(best_ptr, where_ptr, second_ptr, o_slot, m_n, rank, o_m, EXACT: tl.constexpr):
    """Best, where and second of the columns of a tile, each column's slot of this tile row."""
    if EXACT:
        best, where, second = best_two(rank, o_m, 0)
        tl.store(where_ptr + o_slot, where, mask=m_n)
        tl.store(second_ptr + o_slot, second, mask=m_n)
        tl.store(best_ptr + o_slot, best, mask=m_n)
    else:
        tl.store(best_ptr + o_slot, tl.min(rank, 0), mask=m_n)


@triton.jit(do_not_specialize=["first_pair", "images", "patches", "segments", "row_tiles", "splits", "k_tiles", "limit",
                               "band", "grid_width"])  # fmt: skip
def search_kernel(
    x_hi_ptr, x_lo_ptr, x_half_norm_ptr, x_descale_ptr, y_hi_ptr, y_lo_ptr, y_half_norm_ptr, y_descale_ptr, offsets_ptr,
    best_ptr, where_ptr, second_ptr,
    first_pair, images, patches, segments, row_tiles, splits, k_tiles, limit, band, grid_width,
    SPLIT: tl.constexpr, EXACT: tl.constexpr, SYMMETRIC: tl.constexpr, RADIUS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One tile row of one pair: best, where, second of its rows (slot: split) and of its columns (slot: tile row)."""
    program = tl.program_id(0)
    split = program % splits
    row_tile = (program // splits) % row_tiles
    pair = program // splits // row_tiles
    i, j = decode_pair(first_pair + pair, images, segments, SYMMETRIC)
    o_patch = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_patch < patches
    o_m = i * patches + o_patch
    x_half_norm = tl.load(x_half_norm_ptr + o_m, mask=m_m, other=float("inf"))
    x_descale = tl.load(x_descale_ptr + o_m, mask=m_m, other=0.0)
    begin = tl.load(offsets_ptr + j).to(tl.int32)
    end = tl.load(offsets_ptr + j + 1).to(tl.int32)
    low, high = begin, end
    if RADIUS:  # only the rows of the grid that a match can stand in
        low = begin + tl.maximum(row_tile * BLOCK_M // grid_width - band, 0) * grid_width
        high = tl.minimum(begin + ((row_tile * BLOCK_M + BLOCK_M - 1) // grid_width + band + 1) * grid_width, end)
    tiles = (high - low + BLOCK_N - 1) // BLOCK_N
    run = (tiles + splits - 1) // splits
    best = tl.full((BLOCK_M,), float("inf"), tl.float32)
    second = tl.full((BLOCK_M,), float("inf"), tl.float32)
    where = tl.full((BLOCK_M,), -1, tl.int32)
    slots = splits + row_tiles if SYMMETRIC else splits
    base = pair.to(tl.int64) * slots * patches
    for tile in range(split * run, tl.minimum(split * run + run, tiles)):
        o_n = low + tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < high
        acc = tile_products(x_hi_ptr, x_lo_ptr, y_hi_ptr, y_lo_ptr, i * patches + row_tile * BLOCK_M, m_m,
                            low + tile * BLOCK_N, m_n, k_tiles, SPLIT, BLOCK_M, BLOCK_N, BLOCK_K)  # fmt: skip
        y_half_norm = tl.load(y_half_norm_ptr + o_n, mask=m_n, other=float("inf"))
        y_descale = tl.load(y_descale_ptr + o_n, mask=m_n, other=0.0)
        product = acc * x_descale[:, None] * y_descale[None, :]
        if RADIUS:
            product = tl.where(near(o_patch, o_n - begin, limit, grid_width), product, float("-inf"))
        rank = y_half_norm[None, :] - product
        if EXACT:
            tile_best, tile_where, tile_second = best_two(rank, o_n, 1)
            second = tl.minimum(tl.minimum(second, tile_second), tl.maximum(best, tile_best))
            where = tl.where(tile_best < best, tile_where, where)
            best = tl.minimum(best, tile_best)
        else:
            best = tl.minimum(best, tl.min(rank, 1))
        if SYMMETRIC:
            o_slot = base + (splits + row_tile).to(tl.int64) * patches + (o_n - begin)
            store_columns(best_ptr, where_ptr, second_ptr, o_slot, m_n, x_half_norm[:, None] - product, o_m, EXACT)
    o_slot = base + split.to(tl.int64) * patches + o_patch
    tl.store(best_ptr + o_slot, best, mask=m_m)
    if EXACT:
        tl.store(where_ptr + o_slot, where, mask=m_m)
        tl.store(second_ptr + o_slot, second, mask=m_m)


@triton.jit
def direct_cost(
    x_ptr, y_ptr, inverse_unit, o_x, m_x, o_y, m_y, x_patches, y_patches, channels,
    x_stride_i, x_stride_p, x_stride_c, y_stride_i, y_stride_p, y_stride_c,
    DOT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R]: squared distance / unit^2 by differences, or minus the inner product, of rows o_x and o_y; float32."""
    cost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        x = load_row_tile(x_ptr, o_x, m_x, o_c, x_patches, channels, x_stride_i, x_stride_p, x_stride_c)
        y = load_row_tile(y_ptr, o_y, m_y, o_c, y_patches, channels, y_stride_i, y_stride_p, y_stride_c)
        if DOT:
            cost -= x * y
        else:
            difference = x * inverse_unit - y * inverse_unit
            cost += difference * difference
    return tl.sum(cost, 1)


@triton.jit
def exhaust(
    x_ptr, y_ptr, y_half_norm_ptr, inverse_unit, row, begin, end, x_patches, y_patches, channels,
    x_stride_i, x_stride_p, x_stride_c, y_stride_i, y_stride_p, y_stride_c, limit, grid_width,
    DOT: tl.constexpr, RADIUS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Cost and index of the nearest of rows begin to end of y for one row of x, each evaluated directly."""
    least = tl.full((BLOCK_Q,), float("inf"), tl.float32)
    where = tl.full((BLOCK_Q,), NOWHERE, tl.int32)
    o_row = tl.full((BLOCK_Q,), 0, tl.int32) + row
    for start in range(begin, end, BLOCK_Q):
        o_y = start + tl.arange(0, BLOCK_Q)
        m_y = o_y < end
        cost = direct_cost(x_ptr, y_ptr, inverse_unit, o_row, m_y, o_y, m_y, x_patches, y_patches, channels,
                           x_stride_i, x_stride_p, x_stride_c, y_stride_i, y_stride_p, y_stride_c,
                           DOT, BLOCK_Q, BLOCK_C)  # fmt: skip
        usable = tl.load(y_half_norm_ptr + o_y, mask=m_y, other=float("inf")) < float("inf")
        if RADIUS:
            patch = tl.full((1,), 0, tl.int32) + row % x_patches
            usable = usable & (tl.sum(near(patch, o_y - begin, limit, grid_width).to(tl.int32), 0) > 0)
        better = usable & (cost < least)
        least = tl.where(better, cost, least)
        where = tl.where(better, o_y, where)
    lowest = tl.min(least, 0)
    return lowest, tl.min(tl.where(least == lowest, where, NOWHERE), 0)


@triton.jit
def merge_slots(
    best_ptr, where_ptr, second_ptr, o_slot, m_x, low_slot, high_slot, patches,
    EXACT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Best, where and second of rows over their slots, which are in the order of the database: ties stay low."""
    best = tl.full((BLOCK_R,), float("inf"), tl.float32)
    second = tl.full((BLOCK_R,), float("inf"), tl.float32)
    where = tl.full((BLOCK_R,), -1, tl.int32)
    for slot in range(low_slot, high_slot):
        p_slot = o_slot + tl.full((BLOCK_R,), 1, tl.int64) * slot * patches
        slot_best = tl.load(best_ptr + p_slot, mask=m_x, other=float("inf"))
        if EXACT:
            slot_second = tl.load(second_ptr + p_slot, mask=m_x, other=float("inf"))
            slot_where = tl.load(where_ptr + p_slot, mask=m_x, other=-1)
            second = tl.minimum(tl.minimum(second, slot_second), tl.maximum(best, slot_best))
            where = tl.where(slot_best < best, slot_where, where)
        best = tl.minimum(best, slot_best)
    return best, where, second


@triton.jit(do_not_specialize=["first_pair", "images", "patches", "segments", "y_patches", "row_tiles",
                               "splits", "blocks", "bound_step", "rounding", "limit", "grid_width"])  # fmt: skip
def settle_kernel(
    x_ptr, y_ptr, unit_ptr, x_half_norm_ptr, x_length_ptr, x_residual_ptr, y_half_norm_ptr, y_length_ptr,
    y_residual_ptr, offsets_ptr, best_ptr, where_ptr, second_ptr, out_ptr, out_where_ptr,
    first_pair, images, patches, segments, y_patches, channels, row_tiles, splits, blocks, bound_step, rounding,
    limit, grid_width, x_stride_i, x_stride_p, x_stride_c, y_stride_i, y_stride_p, y_stride_c,
    EXACT: tl.constexpr, SYMMETRIC: tl.constexpr, RADIUS: tl.constexpr, DOT: tl.constexpr, INDICES: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """out[row, segment]: distance or inner product of the winner; bounds of a segment: y_length_ptr[j * bound_step]."""
    program = tl.program_id(0)
    block = program % blocks
    pair = program // blocks
    low_slot, high_slot, slots = 0, splits, splits
    if SYMMETRIC:
        side = pair % 2
        pair = pair // 2
        slots = splits + row_tiles
        low_slot = side * splits
        high_slot = splits + side * row_tiles
    i, j = decode_pair(first_pair + pair, images, segments, SYMMETRIC)
    if SYMMETRIC:
        i, j = tl.where(side == 0, i, j), tl.where(side == 0, j, i)
    o_patch = block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_x = o_patch < patches
    o_x = i * patches + o_patch
    o_slot = pair.to(tl.int64) * slots * patches + o_patch
    best, where, second = merge_slots(best_ptr, where_ptr, second_ptr, o_slot, m_x, low_slot, high_slot, patches, EXACT,
                                      BLOCK_R)  # fmt: skip
    unit = tl.load(unit_ptr)
    x_half_norm = tl.load(x_half_norm_ptr + o_x, mask=m_x, other=float("inf"))
    usable = (x_half_norm < float("inf")) & (best < float("inf"))
    if EXACT:
        begin, end = tl.load(offsets_ptr + j).to(tl.int32), tl.load(offsets_ptr + j + 1).to(tl.int32)
        m_y = usable & (where >= 0)
        cost = direct_cost(x_ptr, y_ptr, 1.0 / unit, o_x, m_y, where, m_y, patches, y_patches, channels,
                           x_stride_i, x_stride_p, x_stride_c, y_stride_i, y_stride_p, y_stride_c,
                           DOT, BLOCK_R, BLOCK_C)  # fmt: skip
        x_length = tl.load(x_length_ptr + o_x, mask=m_x, other=0.0)
        x_rest = tl.load(x_residual_ptr + o_x, mask=m_x, other=0.0)
        p_length, p_rest = y_length_ptr + j * bound_step, y_residual_ptr + j * bound_step
        error = proven_error(x_length, x_rest, tl.load(p_length), tl.load(p_rest), rounding)
        open_rows = m_y & (second - best <= 2.02 * error)
        remaining = open_rows.to(tl.int32)
        while tl.sum(remaining, 0) > 0:
            o_r = tl.arange(0, BLOCK_R)
            r = tl.min(tl.where(remaining > 0, o_r, BLOCK_R), 0)
            least, least_where = exhaust(
                x_ptr, y_ptr, y_half_norm_ptr, 1.0 / unit, i * patches + block * BLOCK_R + r, begin, end,
                patches, y_patches, channels, x_stride_i, x_stride_p, x_stride_c, y_stride_i, y_stride_p,
                y_stride_c, limit, grid_width, DOT, RADIUS, BLOCK_Q, BLOCK_C)  # fmt: skip
            cost = tl.where(o_r == r, least, cost)
            where = tl.where(o_r == r, least_where, where)
            remaining = tl.where(o_r == r, 0, remaining)
    else:
        cost = tl.maximum(2.0 * (best + x_half_norm), 0.0)
    p_out = o_x.to(tl.int64) * segments + j
    result = tl.where(usable, -cost if DOT else tl.sqrt(cost) * unit, float("-inf") if DOT else float("inf"))
    tl.store(out_ptr + p_out, result, mask=m_x)
    if INDICES:
        tl.store(out_where_ptr + p_out, tl.where(usable, where, -1), mask=m_x)


STATIC: list = []  # with the tiles that ship: triton_match.py
