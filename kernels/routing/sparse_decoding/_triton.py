"""A weighted sum of few rows per token on the GPU: one program per token and block of channels, rows in order.

Each row is read once, in whole lines; k and the indices are read by the program itself, so nothing waits for the host.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_D = 1024  # channels of a program: one load of a row, 16 bytes a thread in half precision
NUM_WARPS = 4


@triton.jit(do_not_specialize=["k", "rows", "blocks"])
def decode_kernel(
    value_ptr, index_ptr, dictionary_ptr, bias_ptr, out_ptr, k, rows, channels, blocks,
    value_stride_t, value_stride_k, index_stride_t, index_stride_k, stride_m, stride_d,
    HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = bias + sum_j value[t, j] * dictionary[index[t, j]] in float32; an index outside 0..rows-1 adds 0."""
    token = (tl.program_id(0) // blocks).to(tl.int64)
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < channels
    total = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        total = tl.load(bias_ptr + o_d, mask=m_d, other=0.0).to(tl.float32)
    p_value = value_ptr + token * value_stride_t
    p_index = index_ptr + token * index_stride_t
    for _ in range(k):
        index = tl.load(p_index)
        value = tl.load(p_value).to(tl.float32)
        m_row = o_d < tl.where((index >= 0) & (index < rows), channels, 0)
        p_row = dictionary_ptr + index.to(tl.int64) * stride_m
        row = tl.load(p_row + o_d.to(tl.int64) * stride_d, mask=m_row, other=0.0).to(tl.float32)
        total += tl.where(m_row, value * row, 0.0)
        p_index += index_stride_k
        p_value += value_stride_k
    tl.store(out_ptr + token * channels + o_d, total, mask=m_d)


def launch(values: torch.Tensor, indices: torch.Tensor, dictionary: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Rows [T, D]; the contract is that of `decode_sparsely`."""
    (tokens, k), (rows, channels) = values.shape, dictionary.shape
    out = torch.empty(tokens, channels, dtype=dictionary.dtype, device=dictionary.device)
    if out.numel() == 0:
        return out
    blocks = triton.cdiv(channels, BLOCK_D)
    with torch.cuda.device_of(dictionary):
        decode_kernel[(tokens * blocks,)](
            values, indices, dictionary, bias.contiguous(), out, k, rows, channels, blocks, *values.stride(),
            *indices.stride(), *dictionary.stride(), HAS_BIAS=bias.shape[0] > 0, BLOCK_D=BLOCK_D, num_warps=NUM_WARPS,
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        decode_kernel,
        pointers={"index_ptr": "*i32", "dictionary_ptr": kind, "bias_ptr": kind, "out_ptr": kind},
        constants={"HAS_BIAS": True, "BLOCK_D": BLOCK_D, "value_stride_k": 1, "index_stride_k": 1, "stride_d": 1},
        num_warps=NUM_WARPS,
    )
    for kind in ("*fp32", "*bf16")
]
