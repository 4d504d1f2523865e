"""prototype_attention on the GPU: a program has BLOCK_N tokens and BLOCK_C columns and goes through the heads.

Lengths and weights of a head are made anew for each block of columns; its few weights go straight into the second
product. 16-bit input goes through tensor cores in 16 bits; float32 as three tf32 products, which is its accuracy.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

TOKENS, COLUMNS = 64, 128
WARPS, STAGES = 8, 2


@triton.jit
def unit_rows(p_rows, inside, count, width, stride_n, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """1 / max(length, 1e-12) of rows, width at most a few blocks."""
    o_n = tl.arange(0, ROWS)
    square = tl.zeros((ROWS,), tl.float32)
    for part in range(0, width, BLOCK_D):
        o_d = part + tl.arange(0, BLOCK_D)
        x = tl.load(p_rows + (o_n[:, None] * stride_n + o_d[None, :]), mask=inside[:, None] & (o_d < width)[None, :],
                    other=0.0).to(tl.float32)  # fmt: skip
        square += tl.sum(x * x, 1)
    return 1.0 / tl.maximum(tl.sqrt(square), 1e-12) + tl.where(square == square, 0.0, float("nan"))


@triton.jit(do_not_specialize=["tokens", "tiles", "prototypes", "heads"])
def prototype_kernel(
    q_ptr, keys_ptr, table_ptr, tau_ptr, bias_ptr, out_ptr, tokens, tiles, heads, width, prototypes, columns,
    stride_qb, stride_qn, stride_qh,
    BLOCK_T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """out[tokens, columns] of one sample: bias + sum of relu(tau cosine) times the table."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first = tl.program_id(0) % tiles * BLOCK_T
    o_t, o_m = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_M)
    o_c = tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_t = first + o_t < tokens
    p_q = q_ptr + sample * stride_qb + first.to(tl.int64) * stride_qn
    p_keys = keys_ptr + sample * heads * prototypes * width
    p_table = table_ptr + sample * heads * prototypes * columns
    bias = tl.load(bias_ptr + o_c, mask=o_c < columns, other=0.0).to(tl.float32)
    out = tl.zeros((BLOCK_T, BLOCK_W), tl.float32) + bias[None, :]
    for h in range(0, heads):
        tau = tl.load(tau_ptr + h).to(tl.float32)
        inverse = unit_rows(p_q, m_t, tokens, width, stride_qn, BLOCK_T, BLOCK_D) * tau
        for m in range(0, prototypes, BLOCK_M):
            m_m = m + o_m < prototypes
            p_k = p_keys + m * width
            inverse_k = unit_rows(p_k, m_m, prototypes, width, width, BLOCK_M, BLOCK_D)
            scores = tl.zeros((BLOCK_T, BLOCK_M), tl.float32)
            for part in range(0, width, BLOCK_D):
                o_d = part + tl.arange(0, BLOCK_D)
                m_d = (o_d < width)[None, :]
                q = tl.load(p_q + (o_t[:, None] * stride_qn + o_d[None, :]), mask=m_t[:, None] & m_d, other=0.0)
                k = tl.load(p_k + (o_m[:, None] * width + o_d[None, :]), mask=m_m[:, None] & m_d, other=0.0)
                scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
            scores *= inverse[:, None] * inverse_k[None, :]
            weights = tl.where((scores < 0.0) | (m_m == 0)[None, :], 0.0, scores)  # NaN stays
            rows = tl.load(p_table + ((m + o_m)[:, None] * columns + o_c[None, :]),
                           mask=m_m[:, None] & (o_c < columns)[None, :], other=0.0)  # fmt: skip
            out = tl.dot(weights.to(rows.dtype), rows, out, input_precision="tf32x3")
        p_q += stride_qh
        p_keys += prototypes * width
        p_table += prototypes * columns
    p_out = out_ptr + (sample * tokens + first) * columns + (o_t[:, None] * columns + o_c[None, :])
    tl.store(p_out, out, mask=m_t[:, None] & (o_c < columns)[None, :])


def choose(width: int) -> dict[str, Any]:
    """Blocks for this width of a head."""
    depth = min(64, max(16, triton.next_power_of_2(width)))
    return {"BLOCK_T": TOKENS, "BLOCK_M": 16, "BLOCK_D": depth, "BLOCK_W": COLUMNS}


def launch(
    q: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, tau: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """[B, N, C]; the contract is that of `mix_prototypes`."""
    batch, tokens, heads, width = q.shape
    columns = table.shape[2]
    out = torch.empty((batch, tokens, columns), dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    q = q if q.stride(3) == 1 else q.contiguous()
    tiles = triton.cdiv(tokens, TOKENS)
    with torch.cuda.device_of(q):
        prototype_kernel[(batch * tiles, triton.cdiv(columns, COLUMNS))](
            q, keys.contiguous(), table.contiguous(), tau.contiguous(), bias.contiguous(), out, tokens, tiles, heads,
            width, keys.shape[2], columns, *q.stride()[:3], **choose(width), num_warps=WARPS, num_stages=STAGES,
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        prototype_kernel, {f"{name}_ptr": dtype for name in ("q", "keys", "table", "tau", "bias", "out")},
        constants=choose(64), num_warps=WARPS, num_stages=STAGES, tensor_core=True, aligned=("width", "columns"),
    )
    for dtype in ("*fp32", "*bf16", "*fp16")
]  # fmt: skip
