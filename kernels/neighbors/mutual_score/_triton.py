"""Mutual scoring on the GPU: tile products of each unordered pair of images once, then the mean of an interval.

Memory beyond inputs and output: the rows as float16 operands (4 bytes an element for exact float32, else 2), the table
of distances [N, P, N] in float32, and at most 32 MiB of partial minima (`triton_search`). The ends of the interval are
found by bisection on the bits of the distances, so no sorted copy of the table exists.
Nothing waits for the device: a call can be captured in a CUDA graph.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import Match, match_segments
from planmill.kernels.neighbors.mutual_score.reference import interval

INTERVAL_ELEMENTS = 2048  # values of the table that one program of interval_kernel holds at a time


@triton.jit
def count_up_to(table_ptr, row_offset, m_r, images, first_bound, second_bound, BLOCK_N: tl.constexpr):
    """How many entries of each row are <= each of two bounds, as float bits (order-preserving: distances are >= 0)."""
    first = tl.zeros(first_bound.shape, tl.int32)
    second = tl.zeros(first_bound.shape, tl.int32)
    for start in range(0, images, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = m_r[:, None] & (o_n < images)[None, :]
        bits = tl.load(table_ptr + row_offset[:, None] + o_n[None, :], mask=m_n, other=0.0).to(tl.int32, bitcast=True)
        first += tl.sum((m_n & (bits <= first_bound[:, None])).to(tl.int32), 1)
        second += tl.sum((m_n & (bits <= second_bound[:, None])).to(tl.int32), 1)
    return first, second


@triton.jit(do_not_specialize=["rows", "images", "begin", "end"])
def interval_kernel(table_ptr, out_ptr, rows, images, begin, end, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """out[row]: mean of entries begin to end - 1 of the sorted row of table [rows, images], found by bisection."""
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < rows
    row_offset = o_r.to(tl.int64) * images
    low_first = tl.full((BLOCK_R,), -1, tl.int32)  # too few entries up to here
    low_last = tl.full((BLOCK_R,), -1, tl.int32)
    first = tl.full((BLOCK_R,), 0x7F800000, tl.int32)  # enough entries up to here: the bits of infinity
    last = tl.full((BLOCK_R,), 0x7F800000, tl.int32)
    for _ in range(31):
        middle_first = low_first + (first - low_first) // 2
        middle_last = low_last + (last - low_last) // 2
        up_to_first, up_to_last = count_up_to(table_ptr, row_offset, m_r, images, middle_first, middle_last, BLOCK_N)
        first = tl.where(up_to_first > begin, middle_first, first)
        low_first = tl.where(up_to_first > begin, low_first, middle_first)
        last = tl.where(up_to_last >= end, middle_last, last)
        low_last = tl.where(up_to_last >= end, low_last, middle_last)
    below_last = last - 1
    up_to_first, up_to_below = count_up_to(table_ptr, row_offset, m_r, images, first, below_last, BLOCK_N)
    between = tl.zeros((BLOCK_R,), tl.float32)
    for start in range(0, images, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = m_r[:, None] & (o_n < images)[None, :]
        value = tl.load(table_ptr + row_offset[:, None] + o_n[None, :], mask=m_n, other=0.0)
        bits = value.to(tl.int32, bitcast=True)
        between += tl.sum(tl.where(m_n & (bits > first[:, None]) & (bits < last[:, None]), value, 0.0), 1)
    lowest = first.to(tl.float32, bitcast=True)
    highest = last.to(tl.float32, bitcast=True)
    ends = lowest * (up_to_first - begin).to(tl.float32) + highest * (end - up_to_below).to(tl.float32)
    mean = tl.where(first == last, lowest, (between + ends) / (end - begin).to(tl.float32))
    tl.store(out_ptr + o_r, mean, mask=m_r)


def average_interval(table: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Mean over entries begin to end - 1 of the sorted last dimension of non-negative values; [N, P, M] -> [N, P]."""
    out = torch.empty(table.shape[:2], dtype=torch.float32, device=table.device)
    images, rows = table.shape[2], out.numel()
    block_n = min(INTERVAL_ELEMENTS, max(16, triton.next_power_of_2(images)))
    block_r = INTERVAL_ELEMENTS // block_n
    interval_kernel[(triton.cdiv(rows, block_r),)](
        table, out, rows, images, begin, end, BLOCK_R=block_r, BLOCK_N=block_n, num_warps=4
    )
    return out


def limit_of(radius: float, patches: int) -> int:
    """Largest squared grid distance, a whole number, that is within `radius`; -1: no limit."""
    return -1 if radius < 0 or radius >= patches else int(radius * radius)


def score(
    features: torch.Tensor, database: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool,
    symmetric: bool,
) -> torch.Tensor:  # fmt: skip
    """Scores [N, P] of features [N, P, C] against the images of a database [M, Q, C], or against each other."""
    count, patches = database.shape[:2]
    with torch.cuda.device_of(features):
        if features.shape[0] == 0:
            return torch.empty(features.shape[:2], dtype=torch.float32, device=features.device)
        table = torch.full((*features.shape[:2], count), torch.inf, dtype=torch.float32, device=features.device)
        offsets = torch.arange(count + 1, dtype=torch.int32, device=features.device) * patches
        match = Match(
            features, database, offsets, exact, symmetric=symmetric, radius2=limit_of(radius, patches), grid_width=width
        )
        match_segments(match, table, None)
        return average_interval(table, *interval(low, high, count - symmetric))


def launch(
    features: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool
) -> torch.Tensor:  # fmt: skip
    """Scores [N, P] float32 of features [N, P, C]; the contract is that of `score_mutually`."""
    return score(features, features, low, high, radius, width, exact, symmetric=True)


STATIC = [
    StaticKernel(interval_kernel, constants={"BLOCK_R": INTERVAL_ELEMENTS // n, "BLOCK_N": n}) for n in (64, 2048)
]
