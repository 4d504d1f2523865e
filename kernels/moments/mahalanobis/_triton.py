"""mahalanobis on the GPU: one program for a position and a few vectors; the triangle is read once for them.

A batch of one is bound by the bytes of the triangle and is summed on the vector units; from 16 vectors on, tiles of the
triangle go through tensor cores as three tf32 products, which is float32's accuracy.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.sizes import tuned_for
from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_I, BLOCK_J = 64, 16  # 64 rows of the triangle fill the rows of a tensor-core product on sm_90
FEW = 4  # vectors up to which they are taken one by one
TOGETHER = 16


@triton.jit(do_not_specialize=["batch", "positions", "width", "groups"])
def distance_kernel(
    x_ptr, mean_ptr, factor_ptr, out_ptr, batch, positions, width, groups, stride_b, stride_p, stride_d, factor_stride,
    BLOCK_B: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr,
):  # fmt: skip
    """out[b, position] = |G (x - mean)| for BLOCK_B vectors, one or at least 16."""
    position = (tl.program_id(0) // groups).to(tl.int64)
    o_b = tl.program_id(0) % groups * BLOCK_B + tl.arange(0, BLOCK_B)
    p_x = x_ptr + position * stride_p + o_b.to(tl.int64)[:, None] * stride_b
    p_factor = factor_ptr + position * factor_stride
    total = tl.zeros((BLOCK_B,), tl.float32)
    for i in range(0, width, BLOCK_I):
        o_i = i + tl.arange(0, BLOCK_I)
        row = o_i.to(tl.int64) * (o_i + 1) // 2
        w = tl.zeros((BLOCK_I, BLOCK_B), tl.float32)
        for j in range(0, tl.minimum(i + BLOCK_I, width), BLOCK_J):
            o_j = j + tl.arange(0, BLOCK_J)
            m_x = (o_b < batch)[:, None] & (o_j < width)[None, :]
            x = tl.load(p_x + o_j.to(tl.int64)[None, :] * stride_d, mask=m_x, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + position * width + o_j, mask=o_j < width, other=0.0)
            r = tl.where(m_x, x - mean[None, :], 0.0)
            inside = (o_i < width)[:, None] & (o_j[None, :] <= o_i[:, None])
            g = tl.load(p_factor + row[:, None] + o_j[None, :], mask=inside, other=0.0).to(tl.float32)
            if BLOCK_B == 1:
                w += tl.sum(g * r, 1)[:, None]
            else:
                w = tl.dot(g, tl.trans(r), w, input_precision="tf32x3")
        total += tl.sum(w * w, 0)
    tl.store(out_ptr + o_b.to(tl.int64) * positions + position, tl.sqrt(total), mask=o_b < batch)


def launch(x: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Distances [B, P] float32; the contract is that of `measure_mahalanobis`."""
    batch, positions, width = x.shape
    out = torch.zeros(batch, positions, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return out
    mean, factor = mean.contiguous(), factor.contiguous()
    block = 1 if tuned_for(batch) <= FEW else TOGETHER
    groups = triton.cdiv(batch, block)
    with torch.cuda.device_of(x):
        distance_kernel[(positions * groups,)](
            x, mean, factor, out, batch, positions, width, groups, *x.stride(), factor.stride(0),
            BLOCK_B=block, BLOCK_I=BLOCK_I, BLOCK_J=BLOCK_J, num_warps=4,
        )  # fmt: skip
    return out


STATIC = [
    StaticKernel(
        distance_kernel, {"x_ptr": dtype, "factor_ptr": factor},
        constants={"BLOCK_B": block, "BLOCK_I": BLOCK_I, "BLOCK_J": BLOCK_J, "stride_d": 1},
        tensor_core=block > 1,
    )
    for dtype, factor in (("*fp32", "*bf16"), ("*bf16", "*fp32"))
    for block in (1, TOGETHER)
]  # fmt: skip
