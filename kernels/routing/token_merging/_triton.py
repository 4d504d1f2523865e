"""Sums of listed rows on the GPU: one program per merged row and block of channels walks its list in order.

Bound by bytes: every token is read once and every merged row written once. No atomics: every run gives the same bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_C = 1024


@triton.jit(do_not_specialize=["tokens", "rows", "listed", "blocks"])
def merge_kernel(
    x_ptr, offsets_ptr, members_ptr, out_ptr, tokens, rows, listed, channels, blocks, stride_b, stride_n, stride_c,
    MEAN: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[entry, row, block of channels]."""
    program = tl.program_id(0)
    block = program % blocks
    place = program // blocks  # entry * rows + row
    entry = place // rows
    p_offset = offsets_ptr + (place + entry).to(tl.int64)  # offsets have one more per entry
    begin = tl.load(p_offset)
    end = tl.load(p_offset + 1)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    p_entry = x_ptr + entry.to(tl.int64) * stride_b
    p_members = members_ptr + entry.to(tl.int64) * listed
    total = tl.zeros((BLOCK_C,), tl.float32)
    for k in range(begin, end):
        token = tl.load(p_members + k).to(tl.int64)
        total += tl.load(p_entry + token * stride_n + o_c.to(tl.int64) * stride_c, mask=m_c, other=0.0).to(tl.float32)
    if MEAN:
        total = total / tl.maximum(end - begin, 1).to(tl.float32)
    tl.store(out_ptr + place.to(tl.int64) * channels + o_c, total.to(out_ptr.dtype.element_ty), mask=m_c)


def block_of(channels: int) -> int:
    """BLOCK_C for rows of `channels`."""
    return min(BLOCK_C, max(32, triton.next_power_of_2(channels)))


def launch(x: torch.Tensor, offsets: torch.Tensor, members: torch.Tensor, mean: bool) -> torch.Tensor:
    """Rows [B, N_m, C] of the dtype of x; the contract of the op."""
    batch, tokens, channels = x.shape
    rows = offsets.shape[1] - 1
    out = torch.empty(batch, rows, channels, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_c = block_of(channels)
    blocks = triton.cdiv(channels, block_c)
    with torch.cuda.device_of(x):
        merge_kernel[(batch * rows * blocks,)](
            x, offsets.contiguous(), members.contiguous(), out, tokens, rows, members.shape[1], channels, blocks,
            *x.stride(), MEAN=mean, BLOCK_C=block_c, num_warps=4,
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        merge_kernel,
        pointers={"x_ptr": dtype, "out_ptr": dtype, "offsets_ptr": "*i32", "members_ptr": "*i32"},
        constants={"MEAN": True, "BLOCK_C": block_of(channels), "stride_c": 1},
    )
    for dtype, channels in (("*fp16", 1024), ("*fp32", 1024), ("*bf16", 768))
]
