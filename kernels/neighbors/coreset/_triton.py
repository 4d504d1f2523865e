"""Greedy k-centre choice on the GPU: one launch per chosen row.

Each launch finds the row to choose among the best rows that the programs of the launch before left, measures the
distance of every row from it, lowers what the rows have, and leaves the best row of each program for the next launch. A
best row is a key of 64 bits, (squared distance, index): the largest is the farthest row, of equals the one with the
lowest index. Nothing is atomic, and nothing waits for the device: a call can be captured in a CUDA graph.

Distances are measured in a power of two near the largest value, so that no square leaves float32's range. Memory beyond
inputs and outputs: 5 bytes per row; about 45 while the first row is found from distances.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import processors

BLOCK_N, BLOCK_C, NUM_WARPS = 32, 128, 4
PROGRAMS = 4  # per processor


@triton.jit
def pack(nearest, o_n):
    """Keys of rows: farther is larger, of equals the lower index; unusable rows come below, chosen ones lowest."""
    bits = tl.where(nearest >= 0.0, nearest.to(tl.int32, bitcast=True), tl.where(nearest == -1.0, -1, -2))
    return (bits.to(tl.int64) << 32) | (0x7FFFFFFF - o_n).to(tl.int64)


@triton.jit(do_not_specialize=["rows"])
def extent_kernel(
    x_ptr, extent_ptr, rows, channels, stride_n, stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Largest magnitude of each row; -1 where it holds NaN or infinity."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < rows
    largest = tl.zeros((BLOCK_N,), tl.float32)
    usable = m_n
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_n + o_c.to(tl.int64)[None, :] * stride_c
        x = tl.abs(tl.load(p_x, mask=m_n[:, None] & (o_c < channels)[None, :], other=0.0).to(tl.float32))
        finite = x < float("inf")  # false for NaN
        usable = usable & (tl.min(finite.to(tl.int32), 1) > 0)
        largest = tl.maximum(largest, tl.max(tl.where(finite, x, 0.0), 1))
    tl.store(extent_ptr + o_n, tl.where(usable, largest, -1.0), mask=m_n)


@triton.jit(do_not_specialize=["rows", "programs", "step"])
def step_kernel(
    x_ptr, scale_ptr, nearest_ptr, before_ptr, after_ptr, chosen_ptr, rows, channels, programs, step,
    stride_n, stride_c, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Choose row `step` from the keys `before`; lower `nearest`; leave the best key of this program in `after`."""
    program = tl.program_id(0)
    o_p = tl.arange(0, BLOCK_P)
    key = tl.max(tl.load(before_ptr + o_p, mask=o_p < programs, other=-0x7FFFFFFFFFFFFFFF), 0)
    centre = 0x7FFFFFFF - (key & 0x7FFFFFFF)
    if program == 0:
        tl.store(chosen_ptr + step, centre.to(tl.int32))
    scale = tl.load(scale_ptr)
    best = tl.full((BLOCK_N,), -0x7FFFFFFFFFFFFFFF, tl.int64)
    for first in range(program * BLOCK_N, rows, programs * BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < rows
        squared = tl.zeros((BLOCK_N,), tl.float32)
        for begin in range(0, channels, BLOCK_C):
            o_c = begin + tl.arange(0, BLOCK_C)
            m_c = o_c < channels
            p_x = x_ptr + o_n.to(tl.int64)[:, None] * stride_n + o_c.to(tl.int64)[None, :] * stride_c
            x = tl.load(p_x, mask=m_n[:, None] & m_c[None, :], other=0.0).to(tl.float32)
            c = tl.load(x_ptr + centre * stride_n + o_c.to(tl.int64) * stride_c, mask=m_c, other=0.0).to(tl.float32)
            gap = tl.where(m_n[:, None], x * scale - (c * scale)[None, :], 0.0)
            squared += tl.sum(gap * gap, 1)
        nearest = tl.load(nearest_ptr + o_n, mask=m_n, other=-1.0)
        nearest = tl.where(squared < nearest, squared, nearest)  # false where a row or the centre is not finite
        nearest = tl.where(o_n == centre, -float("inf"), nearest)
        tl.store(nearest_ptr + o_n, nearest, mask=m_n)
        best = tl.maximum(best, tl.where(m_n, pack(nearest, o_n), -0x7FFFFFFFFFFFFFFF))
    tl.store(after_ptr + program, tl.max(best, 0))


def launch(features: torch.Tensor, distances: torch.Tensor, count: int, start: int) -> torch.Tensor:
    """Rows [count] int32; the contract is that of `choose_coreset`."""
    rows, channels = features.shape
    device = features.device
    with torch.cuda.device_of(features):
        chosen = torch.empty(count, dtype=torch.int32, device=device)
        nearest = torch.empty(rows, dtype=torch.float32, device=device)
        tile = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C, "num_warps": NUM_WARPS}
        blocks = triton.cdiv(rows, BLOCK_N)
        extent_kernel[(blocks,)](features, nearest, rows, channels, *features.stride(), **tile)
        largest = nearest.amax(0, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        exponent = torch.frexp(largest).exponent.clamp_max(126)
        scale = ((127 - exponent) << 23).view(torch.float32)  # 2 ** -exponent
        usable = nearest >= 0
        if len(distances):
            usable &= ~distances.isnan()
            nearest.copy_(distances * scale).square_()
        else:
            nearest.fill_(torch.inf)
        nearest.masked_fill_(~usable, -1.0)
        programs = min(blocks, PROGRAMS * processors(features))
        keys = torch.empty(2, programs, dtype=torch.int64, device=device)
        if start >= 0:
            keys[0] = 0x7FFFFFFF - start
        else:
            index = torch.arange(rows, dtype=torch.int64, device=device)
            bits = torch.where(usable, nearest.view(torch.int32), -1).to(torch.int64)
            keys[0] = ((bits << 32) | (0x7FFFFFFF - index)).amax()
        for step in range(count):
            step_kernel[(programs,)](
                features, scale, nearest, keys[step % 2], keys[1 - step % 2], chosen, rows, channels, programs, step,
                *features.stride(), BLOCK_P=triton.next_power_of_2(programs), **tile,
            )  # fmt: skip
    return chosen


def _static() -> list[StaticKernel]:
    tile = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C, "stride_c": 1}
    keys = {"before_ptr": "*i64", "after_ptr": "*i64", "chosen_ptr": "*i32"}
    return [
        StaticKernel(extent_kernel, constants=tile, num_warps=NUM_WARPS),
        *(
            StaticKernel(
                step_kernel, pointers={**keys, "x_ptr": kind}, constants={**tile, "BLOCK_P": 1024}, num_warps=NUM_WARPS
            )
            for kind in ("*fp32", "*bf16")
        ),
    ]


STATIC = _static()
