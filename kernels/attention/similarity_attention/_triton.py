"""similarity_attention on the GPU: unit features and their mean square first, then one walk over the keys.

A program has BLOCK_Q rows and BLOCK_V columns of the values; scores are computed anew for each block of columns, since
the sums of all columns do not fit the registers. No atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.attention.correlation_attention._triton import finish, load_rows, online_step, score_parts, stages
from planmill.kernels.common.triton_checks import StaticKernel

TILES = {True: {"BLOCK_Q": 64, "BLOCK_K": 32, "BLOCK_V": 128}, False: {"BLOCK_Q": 32, "BLOCK_K": 16, "BLOCK_V": 64}}
PART = 64
WARPS = 8


@triton.jit(do_not_specialize=["rows", "tiles"])
def similarity_kernel(
    rows_ptr, inverse_ptr, values_ptr, threshold_ptr, out_ptr, rows, width, columns, tiles, gamma,
    stride_b, stride_n,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Rows and columns of one sample: the softmax of gamma f f^T over what reaches the threshold, times the values."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    first, column = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(1) * BLOCK_V
    o_n, o_v = first + tl.arange(0, BLOCK_Q), column + tl.arange(0, BLOCK_V)
    p_rows, p_values = rows_ptr + sample * rows * width, values_ptr + sample * stride_b
    p_inverse = inverse_ptr + sample * rows
    factors = gamma * tl.load(p_inverse + o_n, mask=o_n < rows, other=0.0)
    threshold = tl.load(threshold_ptr + sample)
    top = tl.full((BLOCK_Q,), -1e38, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    seen = tl.zeros((BLOCK_Q,), tl.int32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    for start in range(0, rows, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        scores = score_parts(p_rows, p_rows, first, start, rows, width, width, width, BLOCK_Q, BLOCK_K, PART)
        scores *= factors[:, None] * tl.load(p_inverse + o_k, mask=o_k < rows, other=0.0)[None, :]
        kept = (o_k < rows)[None, :] & (scores >= threshold)
        values = load_rows(p_values, start, rows, column, columns, stride_n, BLOCK_K, BLOCK_V)
        top, total, seen, mixed = online_step(scores, kept, values, top, total, seen, mixed)
    own = load_rows(p_values, first, rows, column, columns, stride_n, BLOCK_Q, BLOCK_V).to(tl.float32)
    alone = (seen == 0)[:, None]
    unknown = tl.where(threshold == threshold, 0.0, float("nan"))
    # a NaN among the values is in `mixed` of every row, as it is in a product with weights that are 0
    result = tl.where(alone, own + mixed * 0.0, finish(total, tl.maximum(seen, 1), mixed)) + unknown
    p_out = out_ptr + (sample * rows + o_n)[:, None] * columns + o_v[None, :]
    tl.store(p_out, result, mask=(o_n < rows)[:, None] & (o_v < columns)[None, :])


def launch(
    features: torch.Tensor, values: torch.Tensor, beta: float, gamma: float, batch_coupled: bool
) -> torch.Tensor:
    """[B, M, C]; the contract is that of `attend_by_similarity`."""
    batch, rows, columns = values.shape
    out = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if out.numel() == 0:
        return out
    unit = torch.nn.functional.normalize(features.float(), dim=2, eps=1e-12)
    means = unit.mean(1).square().sum(1)
    if batch_coupled:
        means = means.mean(0, keepdim=True).expand(batch)
    threshold = (gamma * beta * means).contiguous()
    # in 16 bits the features themselves are multiplied: rounding unit vectors would move pairs across the threshold
    full = features.dtype == torch.float32
    source = (unit if full else features).contiguous()
    lengths = torch.linalg.vector_norm(features, dim=2, dtype=torch.float32).clamp_min(1e-12)
    inverse = torch.ones_like(lengths) if full else 1.0 / lengths.contiguous()
    values = values if values.stride(2) == 1 else values.contiguous()
    tile = TILES[values.dtype != torch.float32]
    tiles = triton.cdiv(rows, tile["BLOCK_Q"])
    with torch.cuda.device_of(values):
        similarity_kernel[(batch * tiles, triton.cdiv(columns, tile["BLOCK_V"]))](
            source, inverse, values, threshold, out, rows, source.shape[2], columns, tiles, gamma,
            *values.stride()[:2], **tile, PART=PART, num_warps=WARPS, num_stages=stages(values.dtype != torch.float32),
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        similarity_kernel, {"rows_ptr": dtype, "values_ptr": dtype, "out_ptr": dtype}, {"gamma": "fp32"},
        {**TILES[half], "PART": PART}, WARPS, stages(half), tensor_core=half, aligned=("width", "columns"),
    )
    for dtype, half in (("*fp32", False), ("*bf16", True), ("*fp16", True))
]  # fmt: skip
