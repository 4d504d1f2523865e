"""lora_mixture on the GPU in one launch: the adapters ride on the base product.

Each program multiplies a block of rows with a block of the weight's rows and, in the same steps, with all the adapters'
first matrices: n * r more columns, 16 beside 128 with two adapters of rank 8. Their products are scaled in float32
where they stand, and one more step, n * r deep, adds them to the result. x and y pass through memory once.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.sizes import tuned_for
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, StaticKernel

GROUP = 8  # blocks of rows between which the block changes fastest: they share the weight's columns


@triton.jit(do_not_specialize=["rows", "tokens", "outputs", "rank", "ranks"])
def mixture_kernel(
    x_ptr, weight_ptr, bias_ptr, down_ptr, up_ptr, omega_ptr, out_ptr, scale, rows, tokens, outputs, channels, adapters,
    rank, ranks, stride_xt, stride_xc, stride_wo, stride_wc, BIAS: tl.constexpr, EVEN_K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out[t, o] = x[t] . weight[o] + bias[o] + sum_j (scale omega[t // tokens, j // rank] x[t] . down[j]) up[j, o]"""
    blocks_m = tl.cdiv(rows, BLOCK_M)
    group = tl.program_id(0) // (GROUP * tl.cdiv(outputs, BLOCK_O))
    within = tl.program_id(0) % (GROUP * tl.cdiv(outputs, BLOCK_O))
    size = tl.minimum(blocks_m - group * GROUP, GROUP)
    o_t = (group * GROUP + within % size) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_o = within // size * BLOCK_O + tl.arange(0, BLOCK_O)
    o_j = tl.arange(0, BLOCK_J)
    m_t, m_o, m_j = o_t < rows, o_o < outputs, o_j < ranks
    p_x = x_ptr + o_t.to(tl.int64)[:, None] * stride_xt
    p_w = weight_ptr + o_o.to(tl.int64)[None, :] * stride_wo
    p_a = down_ptr + o_j[None, :] * channels
    sums = tl.zeros((BLOCK_M, BLOCK_O), tl.float32)
    products = tl.zeros((BLOCK_M, BLOCK_J), tl.float32)
    for start in range(0, channels, BLOCK_K):
        o_c = start + tl.arange(0, BLOCK_K)
        m_c = o_c < (start + BLOCK_K if EVEN_K else channels)
        x = tl.load(p_x + o_c.to(tl.int64)[None, :] * stride_xc, mask=m_t[:, None] & m_c[None, :], other=0.0)
        w = tl.load(p_w + o_c.to(tl.int64)[:, None] * stride_wc, mask=m_c[:, None] & m_o[None, :], other=0.0)
        a = tl.load(p_a + o_c[:, None], mask=m_c[:, None] & m_j[None, :], other=0.0)
        sums = tl.dot(x, w, sums, input_precision="ieee")
        products = tl.dot(x, a, products, input_precision="ieee")
    p_omega = omega_ptr + (o_t // tokens).to(tl.int64)[:, None] * adapters + (o_j // rank)[None, :]
    omega = tl.load(p_omega, mask=m_t[:, None] & m_j[None, :], other=0.0)
    p_up = up_ptr + o_j.to(tl.int64)[:, None] * outputs + o_o[None, :]
    up = tl.load(p_up, mask=m_j[:, None] & m_o[None, :], other=0.0)
    sums = tl.dot((products * (omega * scale)).to(up.dtype), up, sums, input_precision="ieee")
    if BIAS:
        sums += tl.load(bias_ptr + o_o, mask=m_o, other=0.0).to(tl.float32)[None, :]
    p_out = out_ptr + o_t.to(tl.int64)[:, None] * outputs + o_o[None, :]
    tl.store(p_out, sums.to(out_ptr.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


def choose_tile(dtype: torch.dtype, rows: int, ranks: int) -> tuple[dict[str, int], dict[str, int]]:
    """(block sizes, launch options): small blocks where there are few rows or many adapters."""
    block_j = max(16, triton.next_power_of_2(ranks))
    if dtype == torch.float32:
        sizes = (64, 64, 32) if block_j <= 32 else (64, 32, 16)
        options = {"num_warps": 4 if block_j <= 32 else 8, "num_stages": 2}
    elif block_j > 32 or rows <= 1024:
        sizes, options = (64, 64, 64), {"num_warps": 4 if block_j <= 32 else 8, "num_stages": 3}
    else:
        sizes, options = (128, 128, 64), {"num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": sizes[0], "BLOCK_O": sizes[1], "BLOCK_K": sizes[2], "BLOCK_J": block_j, "GROUP": GROUP}, options


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, up: torch.Tensor,
    omega: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The mixture [B, N, O] of the dtype of x; the contract is that of `mix_adapters`."""
    batch, tokens, channels = x.shape
    outputs, (adapters, rank, _) = weight.shape[0], down.shape
    out = torch.empty(batch, tokens, outputs, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    rows = x.reshape(batch * tokens, channels)
    down, up, omega, bias = (t.contiguous() for t in (down, up, omega, bias))
    constants, options = choose_tile(x.dtype, tuned_for(batch * tokens), adapters * rank)
    blocks = triton.cdiv(batch * tokens, constants["BLOCK_M"]) * triton.cdiv(outputs, constants["BLOCK_O"])
    with torch.cuda.device_of(x):
        mixture_kernel[(blocks,)](
            rows, weight, bias, down, up, omega, out, scale, batch * tokens, tokens, outputs, channels, adapters,
            max(rank, 1), adapters * rank, *rows.stride(), *weight.stride(), BIAS=bias.numel() > 0,
            EVEN_K=channels % constants["BLOCK_K"] == 0, **constants, **options,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    made = []
    for kind, dtype, rows, ranks in (
        ("*bf16", torch.bfloat16, 4096, 16), ("*fp16", torch.float16, 197, 16), ("*bf16", torch.bfloat16, 4096, 64),
        ("*fp32", torch.float32, 4096, 16), ("*fp32", torch.float32, 4096, 64),
    ):  # fmt: skip
        constants, options = choose_tile(dtype, rows, ranks)
        names = ("x_ptr", "weight_ptr", "bias_ptr", "down_ptr", "up_ptr", "out_ptr")
        made.append(
            StaticKernel(
                mixture_kernel,
                dict.fromkeys(names, kind),
                {"scale": "fp32"},
                {**constants, "BIAS": True, "EVEN_K": True, "stride_xc": 1, "stride_wc": 1},
                tensor_core=dtype != torch.float32,
                targets=PRODUCT_TARGETS,
                aligned=(),
                **options,
            )
        )
    return made


STATIC = _static()
