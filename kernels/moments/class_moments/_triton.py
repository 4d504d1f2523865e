"""class_moments on the GPU: rows sorted by label, one program per class for the mean, then the covariance's products.

The sort is torch's (radix, stable); its order fixes the order of the sums, so that every run gives the same bits. The
scatter is the product kernel of covariance with the mean of its class as the pivot of each row.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.moments.covariance._triton import TILE_N, finish_kernel, product_kernel, split_rows, tile_width

MEAN_ROWS, MEAN_COLUMNS = 32, 128


@triton.jit(do_not_specialize=["width", "column_blocks"])
def mean_kernel(
    x_ptr, order_ptr, begin_ptr, mean_ptr, width, column_blocks, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """mean[class, BLOCK_D columns] of the rows order[begin[class] : begin[class + 1]]."""
    group = (tl.program_id(0) // column_blocks).to(tl.int64)
    o_d = tl.program_id(0) % column_blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < width
    begin = tl.load(begin_ptr + group)
    end = tl.load(begin_ptr + group + 1)
    first_row = tl.load(order_ptr + tl.where(begin < end, begin, 0))
    p_columns = x_ptr + o_d.to(tl.int64) * stride_d
    pivot = tl.load(p_columns + first_row * stride_n, mask=m_d, other=0.0).to(tl.float32)
    pivot = tl.where((pivot - pivot) == 0.0, pivot, 0.0)  # NaN and infinity are left to the sum
    total = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        row = tl.load(order_ptr + o_n, mask=o_n < end, other=0)
        mask = (o_n < end)[:, None] & m_d[None, :]
        x = tl.load(p_columns[None, :] + row[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(tl.where(mask, x - pivot[None, :], 0.0), 0)
    mean = pivot + total / tl.maximum(end - begin, 1).to(tl.int32).to(tl.float32)
    tl.store(mean_ptr + group * width + o_d, tl.where(begin < end, mean, 0.0), mask=m_d)


def launch(features: torch.Tensor, labels: torch.Tensor, classes: int) -> tuple[torch.Tensor, ...]:
    """means, scatter, counts; the contract is that of `average_by_class`."""
    rows, width = features.shape
    device = features.device
    y = torch.where((labels >= 0) & (labels < classes), labels, classes).to(torch.int32)
    ordered, order = y.sort(stable=True)
    begin = torch.searchsorted(ordered, torch.arange(classes + 1, dtype=torch.int32, device=device))
    counts = begin.diff().int()
    means = torch.zeros(classes + 1, width, dtype=torch.float32, device=device)
    scatter = torch.zeros(1, width, width, dtype=torch.float32, device=device)
    if features.numel() == 0:
        return means[:classes].contiguous(), scatter[0], counts
    tile = tile_width(width)
    blocks, columns = triton.cdiv(width, tile), triton.cdiv(width, MEAN_COLUMNS)
    pairs = blocks * (blocks + 1) // 2
    splits = split_rows(1, rows, pairs, tile)
    run = triton.cdiv(triton.cdiv(rows, splits), TILE_N) * TILE_N
    with torch.cuda.device_of(features):
        mean_kernel[(classes * columns,)](
            features, order, begin, means, width, columns, *features.stride(),
            BLOCK_N=MEAN_ROWS, BLOCK_D=MEAN_COLUMNS,
        )  # fmt: skip
        partial = torch.empty(splits, pairs, tile, tile, dtype=torch.float32, device=device)
        product_kernel[(splits * pairs,)](
            features, means, y, partial, rows, width, pairs, splits, run, classes, 0, *features.stride(),
            BLOCK_N=TILE_N, BLOCK_D=tile, BY_LABEL=True, num_warps=8 if tile == 128 else 4, num_stages=2,
        )  # fmt: skip
        nothing = torch.zeros(width, dtype=torch.float64, device=device)
        slice_rows = min(16, tile)
        finish_kernel[(pairs * (tile // slice_rows),)](
            partial, nothing, scatter, rows, width, pairs, splits, BLOCK_D=tile, SLICE=slice_rows
        )
    return means[:classes].contiguous(), scatter[0], counts


def _static() -> list[StaticKernel]:
    made = []
    for dtype, width in (("*fp32", 512), ("*bf16", 512)):
        tile = tile_width(width)
        made += [
            StaticKernel(
                mean_kernel, {"x_ptr": dtype, "order_ptr": "*i64", "begin_ptr": "*i64"},
                constants={"BLOCK_N": MEAN_ROWS, "BLOCK_D": MEAN_COLUMNS, "stride_d": 1},
            ),
            StaticKernel(
                product_kernel, {"x_ptr": dtype, "label_ptr": "*i32"},
                constants={"BLOCK_N": TILE_N, "BLOCK_D": tile, "BY_LABEL": True, "stride_d": 1},
                num_warps=8, num_stages=2, tensor_core=True,
            ),
        ]  # fmt: skip
    return made


STATIC = _static()
