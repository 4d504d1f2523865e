"""covariance on the GPU: tiles of one triangle as tensor-core products, split over the rows; no atomics.

Rows are taken relative to a pivot (the mean of 256 rows spread over the set). Products are three tf32 products of the
high and low halves of each number, which is float32's accuracy at a third of the tf32 rate. Partial sums go through a
workspace whose size depends on shapes only and are added in a fixed order: every run gives the same bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

PIVOT_ROWS = 256
SUM_ROWS, SUM_COLUMNS = 64, 128
TILE_N = 16
SPLIT_ROWS = 2048  # fewest rows of a split
PROGRAMS = 264  # two for each of an H100's 132 multiprocessors
WORKSPACE = 1 << 26  # bytes of partial products that the number of splits keeps to


@triton.jit(do_not_specialize=["rows", "width", "chunks"])
def sums_kernel(
    x_ptr, pivot_ptr, linear_ptr, third_ptr, fourth_ptr, rows, width, chunks, stride_b, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N rows: sum of z, of |z|^2 z and of |z|^4, where z = x - pivot."""
    chunk = tl.program_id(0) % chunks
    batch = (tl.program_id(0) // chunks).to(tl.int64)
    o_n = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    p_rows = x_ptr + batch * stride_b + o_n.to(tl.int64)[:, None] * stride_n
    square = tl.zeros((BLOCK_N,), tl.float32)
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        mask = (o_n < rows)[:, None] & (o_d < width)[None, :]
        pivot = tl.load(pivot_ptr + batch * width + o_d, mask=o_d < width, other=0.0)
        x = tl.load(p_rows + o_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        z = tl.where(mask, x - pivot[None, :], 0.0)
        square += tl.sum(z * z, 1)
    p_sums = tl.program_id(0).to(tl.int64) * width
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        mask = (o_n < rows)[:, None] & (o_d < width)[None, :]
        pivot = tl.load(pivot_ptr + batch * width + o_d, mask=o_d < width, other=0.0)
        x = tl.load(p_rows + o_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
        z = tl.where(mask, x - pivot[None, :], 0.0)
        tl.store(linear_ptr + p_sums + o_d, tl.sum(z, 0), mask=o_d < width)
        tl.store(third_ptr + p_sums + o_d, tl.sum(square[:, None] * z, 0), mask=o_d < width)
    tl.store(fourth_ptr + tl.program_id(0), tl.sum(square * square))


@triton.jit
def tile_of(pair):
    """(row, column) of tile `pair` of the upper triangle, counted column by column."""
    column = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) * 0.5).to(tl.int32)
    column = tl.where(column * (column + 1) // 2 > pair, column - 1, column)
    column = tl.where((column + 1) * (column + 2) // 2 <= pair, column + 1, column)
    return pair - column * (column + 1) // 2, column


@triton.jit
def centred_tile(p_rows, o_d, m_n, width, pivot_ptr, label, stride_d, BY_LABEL: tl.constexpr):
    """Rows relative to their pivot, float32: one pivot for all, or that of each row's label; 0 outside."""
    mask = m_n[:, None] & (o_d < width)[None, :]
    x = tl.load(p_rows + o_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    if BY_LABEL:
        pivot = tl.load(pivot_ptr + label[:, None] * width + o_d[None, :], mask=mask, other=0.0)
    else:
        pivot = tl.load(pivot_ptr + o_d, mask=o_d < width, other=0.0)[None, :]
    return tl.where(mask, x - pivot, 0.0)


@triton.jit(do_not_specialize=["rows", "width", "pairs", "splits", "run", "classes"])
def product_kernel(
    x_ptr, pivot_ptr, label_ptr, partial_ptr, rows, width, pairs, splits, run, classes, stride_b, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BY_LABEL: tl.constexpr,
):  # fmt: skip
    """partial[batch, split, pair] = z[rows of the split, tile row]^T z[..., tile column].

    BY_LABEL: the pivots are [classes, width], and rows of a label from `classes` on count as 0.
    """
    pair = tl.program_id(0) % pairs
    split = tl.program_id(0) // pairs % splits
    batch = (tl.program_id(0) // pairs // splits).to(tl.int64)
    i, j = tile_of(pair)
    o_i = i * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = j * BLOCK_D + tl.arange(0, BLOCK_D)
    p_set = x_ptr + batch * stride_b
    p_pivot = pivot_ptr + batch * width
    end = tl.minimum((split + 1) * run, rows)
    sums = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for first in range(split * run, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        label = o_n.to(tl.int64)
        if BY_LABEL:
            label = tl.load(label_ptr + o_n, mask=m_n, other=0).to(tl.int64)
            m_n = m_n & (label < classes)
        p_rows = p_set + o_n.to(tl.int64)[:, None] * stride_n
        a = centred_tile(p_rows, o_i, m_n, width, p_pivot, label, stride_d, BY_LABEL)
        b = centred_tile(p_rows, o_j, m_n, width, p_pivot, label, stride_d, BY_LABEL)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="tf32x3")
    o_tile = tl.arange(0, BLOCK_D)[:, None] * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * (BLOCK_D * BLOCK_D) + o_tile, sums)


@triton.jit(do_not_specialize=["rows", "width", "pairs", "splits"])
def finish_kernel(
    partial_ptr, off_ptr, scatter_ptr, rows, width, pairs, splits, BLOCK_D: tl.constexpr, SLICE: tl.constexpr
):
    """scatter = sum of the splits - rows * off off^T, both triangles, SLICE rows of a tile; float64 inside."""
    slices = BLOCK_D // SLICE
    part = tl.program_id(0) % slices
    pair = tl.program_id(0) // slices % pairs
    batch = (tl.program_id(0) // slices // pairs).to(tl.int64)
    i, j = tile_of(pair)
    o_r = part * SLICE + tl.arange(0, SLICE)
    o_c = tl.arange(0, BLOCK_D)
    o_i = i * BLOCK_D + o_r
    o_j = j * BLOCK_D + o_c
    o_tile = o_r[:, None] * BLOCK_D + o_c[None, :]
    total = tl.zeros((SLICE, BLOCK_D), tl.float64)
    for split in range(0, splits):
        p_tile = partial_ptr + ((batch * splits + split) * pairs + pair) * (BLOCK_D * BLOCK_D)
        total += tl.load(p_tile + o_tile).to(tl.float64)
    off_i = tl.load(off_ptr + batch * width + o_i, mask=o_i < width, other=0.0)
    off_j = tl.load(off_ptr + batch * width + o_j, mask=o_j < width, other=0.0)
    value = (total - rows * off_i[:, None] * off_j[None, :]).to(tl.float32)
    mask = (o_i < width)[:, None] & (o_j < width)[None, :]
    p_scatter = scatter_ptr + batch * width * width
    tl.store(p_scatter + o_i.to(tl.int64)[:, None] * width + o_j[None, :], value, mask=mask & (o_i[:, None] <= o_j))
    tl.store(p_scatter + o_j.to(tl.int64)[None, :] * width + o_i[:, None], value, mask=mask & (o_i[:, None] <= o_j))


def tile_width(width: int) -> int:
    """BLOCK_D for `width` channels."""
    return 128 if width > 64 else max(16, triton.next_power_of_2(width))


def split_rows(sets: int, rows: int, pairs: int, tile: int) -> int:
    """How many splits of the rows fill the device within the workspace; from shapes only."""
    wanted = triton.cdiv(PROGRAMS, sets * pairs)
    fitting = WORKSPACE // (sets * pairs * tile * tile * 4)
    return max(1, min(wanted, fitting, triton.cdiv(rows, SPLIT_ROWS)))


def launch(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """mean, its rest, scatter, third, fourth of the sets x [B, N, d]; the contract is that of the op."""
    sets, rows, width = x.shape
    mean = torch.zeros(sets, width, dtype=torch.float32, device=x.device)
    scatter = torch.zeros(sets, width, width, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return mean, torch.zeros_like(mean), scatter, torch.zeros_like(mean), mean.new_zeros(sets)
    pivot = x[:, :: max(1, rows // PIVOT_ROWS)].double().mean(1).float()
    tile = tile_width(width)
    blocks, chunks = triton.cdiv(width, tile), triton.cdiv(rows, SUM_ROWS)
    pairs = blocks * (blocks + 1) // 2
    splits = split_rows(sets, rows, pairs, tile)
    run = triton.cdiv(triton.cdiv(rows, splits), TILE_N) * TILE_N
    with torch.cuda.device_of(x):
        linear = torch.empty(sets, chunks, width, dtype=torch.float32, device=x.device)
        cubes, fourths = torch.empty_like(linear), torch.empty(sets, chunks, dtype=torch.float32, device=x.device)
        partial = torch.empty(sets, splits, pairs, tile, tile, dtype=torch.float32, device=x.device)
        sums_kernel[(sets * chunks,)](
            x, pivot, linear, cubes, fourths, rows, width, chunks, *x.stride(), BLOCK_N=SUM_ROWS, BLOCK_D=SUM_COLUMNS
        )
        product_kernel[(sets * splits * pairs,)](
            x, pivot, x, partial, rows, width, pairs, splits, run, 0, *x.stride(),
            BLOCK_N=TILE_N, BLOCK_D=tile, BY_LABEL=False, num_warps=8 if tile == 128 else 4, num_stages=2,
        )  # fmt: skip
        off = linear.sum(1, dtype=torch.float64) / rows
        slice_rows = min(16, tile)
        finish_kernel[(sets * pairs * (tile // slice_rows),)](
            partial, off, scatter, rows, width, pairs, splits, BLOCK_D=tile, SLICE=slice_rows
        )
    # With a = |z|^2, b = z . off and e = |off|^2, the squared distance from the mean is a - 2 b + e.
    cube, fourth = cubes.sum(1, dtype=torch.float64), fourths.sum(1, dtype=torch.float64)
    e = (off * off).sum(1)
    about = scatter.double()
    along = (about @ off[:, :, None])[:, :, 0] + rows * e[:, None] * off
    trace = about.diagonal(dim1=1, dim2=2).sum(1) + rows * e
    third = cube - 2 * along + rows * e[:, None] * off - off * (trace - rows * e)[:, None]
    fourth = fourth + 4 * (off * along).sum(1) - 3 * rows * e * e - 4 * (off * cube).sum(1) + 2 * e * trace
    center = pivot + off
    mean = center.float()
    return mean, (center - mean).float(), scatter, third.float(), fourth.float()


def _static() -> list[StaticKernel]:
    made = []
    for dtype, width in (("*fp32", 768), ("*bf16", 768), ("*fp16", 40)):
        tile = tile_width(width)
        pointers = {"x_ptr": dtype, "off_ptr": "*fp64"}
        made += [
            StaticKernel(sums_kernel, pointers, constants={"BLOCK_N": SUM_ROWS, "BLOCK_D": SUM_COLUMNS, "stride_d": 1}),
            StaticKernel(
                product_kernel, {**pointers, "label_ptr": dtype},
                constants={"BLOCK_N": TILE_N, "BLOCK_D": tile, "BY_LABEL": False, "stride_d": 1},
                num_warps=8 if tile == 128 else 4, num_stages=2, tensor_core=True,
            ),
            StaticKernel(finish_kernel, pointers, constants={"BLOCK_D": tile, "SLICE": min(16, tile)}),
        ]  # fmt: skip
    return made


STATIC = _static()
