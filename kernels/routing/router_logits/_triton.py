"""router_logits on the GPU: tiles of one size for every batch, so that the order of the sums never changes."""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_T, BLOCK_D = 64, 32


@triton.jit(do_not_specialize=["tokens", "experts", "columns"])
def logits_kernel(
    x_ptr, w_ptr, bias_ptr, out_ptr, tokens, width, experts, columns, stride_t, stride_d, stride_e, stride_k,
    BIAS: tl.constexpr, ALIKE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[BLOCK_T tokens, BLOCK_E experts]; ALIKE: operands of one 16-bit dtype, multiplied as they are."""
    o_t = tl.program_id(0) // columns * BLOCK_T + tl.arange(0, BLOCK_T)
    o_e = tl.program_id(0) % columns * BLOCK_E + tl.arange(0, BLOCK_E)
    p_x = x_ptr + o_t.to(tl.int64)[:, None] * stride_t
    p_w = w_ptr + o_e.to(tl.int64)[:, None] * stride_e
    sums = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, width, BLOCK_D):
        o_d = first + tl.arange(0, BLOCK_D)
        m_x = (o_t < tokens)[:, None] & (o_d < width)[None, :]
        m_w = (o_e < experts)[:, None] & (o_d < width)[None, :]
        x = tl.load(p_x + o_d.to(tl.int64)[None, :] * stride_d, mask=m_x, other=0.0)
        w = tl.load(p_w + o_d.to(tl.int64)[None, :] * stride_k, mask=m_w, other=0.0)
        if ALIKE:
            sums = tl.dot(x, tl.trans(w), sums)
        else:
            sums = tl.dot(x.to(tl.float32), tl.trans(w.to(tl.float32)), sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + o_e, mask=o_e < experts, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + o_t.to(tl.int64)[:, None] * experts + o_e[None, :]
    tl.store(p_out, sums, mask=(o_t < tokens)[:, None] & (o_e < experts)[None, :])


def expert_tile(experts: int) -> int:
    """BLOCK_E for so many experts."""
    return min(64, max(16, triton.next_power_of_2(experts)))


def launch(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] float32; the contract is that of `score_experts`."""
    (tokens, width), experts = x.shape, weight.shape[0]
    out = torch.empty(tokens, experts, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    tile = expert_tile(experts)
    columns = triton.cdiv(experts, tile)
    alike = x.dtype == weight.dtype and x.dtype != torch.float32
    with torch.cuda.device_of(x):
        logits_kernel[(triton.cdiv(tokens, BLOCK_T) * columns,)](
            x, weight, bias, out, tokens, width, experts, columns, *x.stride(), *weight.stride(),
            BIAS=bias.numel() > 0, ALIKE=alike, BLOCK_T=BLOCK_T, BLOCK_E=tile, BLOCK_D=BLOCK_D, num_warps=4,
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        logits_kernel, {"x_ptr": dtype, "w_ptr": dtype, "bias_ptr": dtype},
        constants={"BIAS": True, "ALIKE": dtype != "*fp32", "BLOCK_T": BLOCK_T, "BLOCK_E": tile, "BLOCK_D": BLOCK_D,
                   "stride_d": 1, "stride_k": 1},
        tensor_core=dtype != "*fp32",
    )
    for dtype, tile in (("*bf16", 16), ("*fp16", 64), ("*fp32", 64))
]  # fmt: skip
