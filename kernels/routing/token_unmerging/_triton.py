"""Rows by index on the GPU, with residual and scale in the same pass. Bound by bytes."""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_R, BLOCK_C = 4, 512


@triton.jit(do_not_specialize=["places", "tokens", "blocks"])
def unmerge_kernel(
    y_ptr, row_ptr, residual_ptr, scale_ptr, out_ptr, places, tokens, channels, blocks,
    y_stride_b, y_stride_n, y_stride_c, r_stride_b, r_stride_n, r_stride_c,
    RESIDUAL: tl.constexpr, SCALE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, N, C], of which `places` = B * N rows."""
    program = tl.program_id(0)
    block = program % blocks
    o_place = program // blocks * BLOCK_R + tl.arange(0, BLOCK_R)
    m_place = o_place < places
    entry = o_place // tokens
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = m_place[:, None] & (o_c < channels)[None, :]
    row = tl.load(row_ptr + o_place, mask=m_place, other=0)
    p_y = y_ptr + entry.to(tl.int64) * y_stride_b + row.to(tl.int64) * y_stride_n
    x = tl.load(p_y[:, None] + o_c.to(tl.int64)[None, :] * y_stride_c, mask=mask, other=0.0).to(tl.float32)
    if SCALE:
        x = x * tl.load(scale_ptr + o_c, mask=o_c < channels, other=0.0)[None, :]
    if RESIDUAL:
        p_r = residual_ptr + entry.to(tl.int64) * r_stride_b + (o_place - entry * tokens).to(tl.int64) * r_stride_n
        x += tl.load(p_r[:, None] + o_c.to(tl.int64)[None, :] * r_stride_c, mask=mask, other=0.0).to(tl.float32)
    p_out = out_ptr + o_place.to(tl.int64)[:, None] * channels + o_c[None, :]
    tl.store(p_out, x.to(out_ptr.dtype.element_ty), mask=mask)


def launch(y: torch.Tensor, row_of_token: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N, C] of the dtype of y; the contract of the op."""
    batch, _, channels = y.shape
    tokens = row_of_token.shape[1]
    out = torch.empty(batch, tokens, channels, dtype=y.dtype, device=y.device)
    if out.numel() == 0:
        return out
    added = residual.numel() > 0
    blocks = triton.cdiv(channels, BLOCK_C)
    with torch.cuda.device_of(y):
        unmerge_kernel[(triton.cdiv(batch * tokens, BLOCK_R) * blocks,)](
            y, row_of_token.contiguous(), residual, scale.contiguous(), out, batch * tokens, tokens, channels, blocks,
            *y.stride(), *(residual.stride() if added else (0, 0, 0)), RESIDUAL=added, SCALE=scale.numel() > 0,
            BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        unmerge_kernel,
        pointers={"y_ptr": dtype, "residual_ptr": dtype, "out_ptr": dtype, "row_ptr": "*i32"},
        constants={"RESIDUAL": added, "SCALE": added, "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "y_stride_c": 1,
                   "r_stride_c": 1},
    )
    for dtype, added in (("*bf16", True), ("*fp16", False), ("*fp32", True))
]  # fmt: skip
