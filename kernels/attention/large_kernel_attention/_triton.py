"""large_kernel_attention on the GPU in two launches: the depthwise convolutions plane by plane, then the pointwise one.

A program convolves a whole plane twice; between the two lies a buffer that only it writes and reads, which the caches
hold (13 kilobytes at 56 x 56). The pointwise product adds its bias and takes the product with x before it stores. Sums
are float32, products of 16-bit inputs are TF32. No atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

PIXELS = 1024  # of a step of the convolutions: of one plane, or of several small ones
ROWS = {torch.float32: 32, torch.bfloat16: 64, torch.float16: 64}  # channels of a tile of the product
COLUMNS, DEPTH = 64, 32  # its pixels, and the channels summed in a step


@triton.jit
def convolve(p_x, p_weight, bias, o_p, m_r, height, width, K: tl.constexpr, DILATION: tl.constexpr):
    """Values of depthwise convolutions at the pixels `o_p` of planes, float32; what lies outside of a plane is zero."""
    row, column = o_p // width, o_p % width
    sums = bias[:, None] + tl.zeros_like(o_p).to(tl.float32)[None, :]
    for tap in range(K * K):
        y = row + (tap // K - K // 2) * DILATION
        x = column + (tap % K - K // 2) * DILATION
        inside = m_r[:, None] & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[None, :]
        value = tl.load(p_x[:, None] + (y * width + x)[None, :], mask=inside, other=0.0).to(tl.float32)
        sums += value * tl.load(p_weight + tap, mask=m_r, other=0.0).to(tl.float32)[:, None]
    return sums


@triton.jit(do_not_specialize=["planes", "channels", "height", "width"])
def plane_kernel(
    x_ptr, weight5_ptr, bias5_ptr, weight7_ptr, bias7_ptr, between_ptr, t_ptr, planes, channels, height, width,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t = DW7(DW5(x)) of ROWS planes, BLOCK pixels at a time."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < planes
    channel = o_r % channels
    pixels = height * width
    at = o_r.to(tl.int64) * pixels
    bias5 = tl.load(bias5_ptr + channel, mask=m_r, other=0.0).to(tl.float32)
    bias7 = tl.load(bias7_ptr + channel, mask=m_r, other=0.0).to(tl.float32)
    for start in range(0, pixels, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        sums = convolve(x_ptr + at, weight5_ptr + channel * 25, bias5, o_p, m_r, height, width, 5, 1)
        tl.store((between_ptr + at)[:, None] + o_p[None, :], sums, mask=m_r[:, None] & (o_p < pixels)[None, :])
    tl.debug_barrier()  # the other threads' part of the planes
    for start in range(0, pixels, BLOCK):
        o_p = start + tl.arange(0, BLOCK)
        sums = convolve(between_ptr + at, weight7_ptr + channel * 49, bias7, o_p, m_r, height, width, 7, 3)
        tl.store((t_ptr + at)[:, None] + o_p[None, :], sums, mask=m_r[:, None] & (o_p < pixels)[None, :])


@triton.jit(do_not_specialize=["pixels", "blocks"])
def point_kernel(
    x_ptr, t_ptr, weight_ptr, bias_ptr, out_ptr, channels, pixels, blocks,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = x (weight t + bias): BLOCK_M channels, BLOCK_P pixels of one image."""
    image = (tl.program_id(0) // blocks).to(tl.int64) * channels * pixels
    o_p = tl.program_id(0) % blocks * BLOCK_P + tl.arange(0, BLOCK_P)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_p, m_m = o_p < pixels, o_m < channels
    sums = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for start in range(0, channels, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < channels
        p_weight = weight_ptr + o_m.to(tl.int64)[:, None] * channels + o_k[None, :]
        weight = tl.load(p_weight, mask=m_m[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        p_t = t_ptr + image + o_k.to(tl.int64)[:, None] * pixels + o_p[None, :]
        t = tl.load(p_t, mask=m_k[:, None] & m_p[None, :], other=0.0)
        sums += tl.dot(weight, t, input_precision=PRECISION)
    sums += tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[:, None]
    o_out = image + o_m.to(tl.int64)[:, None] * pixels + o_p[None, :]
    m_out = m_m[:, None] & m_p[None, :]
    x = tl.load(x_ptr + o_out, mask=m_out, other=0.0).to(tl.float32)
    tl.store(out_ptr + o_out, x * sums, mask=m_out)


def launch(
    x: torch.Tensor, weight5: torch.Tensor, bias5: torch.Tensor, weight7: torch.Tensor, bias7: torch.Tensor,
    weight_point: torch.Tensor, bias_point: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """y [B, C, H, W]; the contract is that of `attend_with_large_kernel`."""
    x = x.contiguous()
    small = [w.contiguous() for w in (weight5, bias5, weight7, bias7)]
    weight, bias = weight_point.contiguous(), bias_point.contiguous()
    batch, channels, height, width = x.shape
    pixels = height * width
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    between, t = (torch.empty(x.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    blocks = triton.cdiv(pixels, COLUMNS)
    with torch.cuda.device_of(x):
        block = min(PIXELS, triton.next_power_of_2(pixels))
        plane_kernel[(triton.cdiv(batch * channels, PIXELS // block),)](
            x, *small, between, t, batch * channels, channels, height, width, ROWS=PIXELS // block, BLOCK=block,
            num_warps=4,
        )  # fmt: skip
        point_kernel[(batch * blocks, triton.cdiv(channels, ROWS[x.dtype]))](
            x, t, weight, bias, out, channels, pixels, blocks,
            PRECISION="ieee" if x.dtype is torch.float32 else "tf32",
            BLOCK_M=ROWS[x.dtype], BLOCK_P=COLUMNS, BLOCK_K=DEPTH, num_warps=4,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    made = []
    for dtype, kind in ((torch.float32, "*fp32"), (torch.bfloat16, "*bf16")):
        weights = {f"{name}_ptr": kind for name in ("x", "weight", "bias", "out")}
        weights |= {f"{name}{size}_ptr": kind for name in ("weight", "bias") for size in (5, 7)}
        tile = {
            "PRECISION": "ieee" if kind == "*fp32" else "tf32",
            "BLOCK_M": ROWS[dtype],
            "BLOCK_P": COLUMNS,
            "BLOCK_K": DEPTH,
        }
        made += [
            StaticKernel(plane_kernel, weights, constants={"ROWS": 1, "BLOCK": PIXELS}),
            StaticKernel(point_kernel, weights, constants=tile, tensor_core=kind != "*fp32"),
        ]
    return made


STATIC = _static()
