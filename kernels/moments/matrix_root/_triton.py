"""matrix_root on the GPU: up to 32 channels the whole iteration in one program, beyond it one launch for each product.

Products are three tf32 products of the high and low halves of each number: float32's accuracy. Iterates commute, so
that of a product only tiles of the upper triangle are computed; each is stored twice, once transposed. Iterated are P
and X, not Y and Z: see matrix_root_cpu.cpp. The launches depend on shapes and the number of iterations only.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.moments.covariance._triton import tile_of

ON_CHIP = 32  # at 64 the halves of a product no longer fit the registers
TILE, TILE_K = 64, 32
LARGEST = tl.constexpr(3.4028234e38)


@triton.jit
def symmetric_product(a, b):
    """The symmetric part of a b, for symmetric matrices that commute."""
    c = tl.dot(a, b, input_precision="tf32x3")
    return (c + tl.trans(c)) * 0.5


@triton.jit(do_not_specialize=["width", "iterations"])
def whole_kernel(
    s_ptr, out_ptr, width, iterations, stride_b, stride_r, stride_c, INVERSE: tl.constexpr, BLOCK_D: tl.constexpr
):
    """One matrix: normalised, iterated, stored."""
    batch = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    rows, columns = o_d[:, None], o_d[None, :]
    inside = (rows < width) & (columns < width)
    p_s = s_ptr + batch * stride_b
    near = tl.load(p_s + rows.to(tl.int64) * stride_r + columns.to(tl.int64) * stride_c, mask=inside, other=0.0)
    far = tl.load(p_s + columns.to(tl.int64) * stride_r + rows.to(tl.int64) * stride_c, mask=inside, other=0.0)
    near, far = near.to(tl.float32), far.to(tl.float32)
    largest = tl.max(tl.max(tl.abs(near), 1), 0)  # a trace of what is below one neither overflows nor vanishes
    largest = tl.where(largest > 0.0, largest, 1.0)
    s = (tl.div_rn(near, largest) + tl.div_rn(far, largest)) * 0.5
    trace = tl.sum(tl.sum(tl.where(rows == columns, s, 0.0), 1), 0)
    unknown = tl.sum(tl.sum(tl.where(tl.abs(near) <= LARGEST, 0.0, 1.0), 1), 0)
    trace = tl.where(unknown > 0.0, float("nan"), trace)
    empty = trace == 0.0
    trace = tl.where(empty, 1.0, trace)
    one = tl.where(inside & (rows == columns), 1.5, 0.0)
    p = s / trace
    m = one - 0.5 * p
    x = m if INVERSE else symmetric_product(p, m)
    for step in range(1, iterations):
        p = symmetric_product(p, m) if INVERSE or step > 1 else x
        p = symmetric_product(p, m)
        m = one - 0.5 * p
        x = symmetric_product(x, m)
    root = tl.sqrt_rn(trace) * tl.sqrt_rn(largest)
    out = x / root if INVERSE else x * root
    p_out = out_ptr + batch * width * width + rows * width + columns
    tl.store(p_out, tl.where(empty, 0.0, out), mask=inside)


@triton.jit(do_not_specialize=["width", "pairs"])
def product_kernel(
    a_ptr, p_ptr, c_ptr, factor_ptr, width, pairs,
    SCALED: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of c = a (3 I - p) / 2 (times factor[batch]) one tile of the upper triangle and its mirror image."""
    i, j = tile_of(tl.program_id(0) % pairs)
    batch = (tl.program_id(0) // pairs).to(tl.int64)
    base = batch * width * width
    o_i = i * BLOCK_D + tl.arange(0, BLOCK_D)
    o_j = j * BLOCK_D + tl.arange(0, BLOCK_D)
    rows, columns = o_i.to(tl.int64)[:, None], o_j[None, :]
    sums = tl.zeros((BLOCK_D, BLOCK_D), tl.float32)
    for first in range(0, width, BLOCK_K):
        o_k = first + tl.arange(0, BLOCK_K)
        m_a = (rows < width) & (o_k < width)[None, :]
        m_p = (o_k < width)[:, None] & (columns < width)
        a = tl.load(a_ptr + base + rows * width + o_k[None, :], mask=m_a, other=0.0)
        p = tl.load(p_ptr + base + o_k.to(tl.int64)[:, None] * width + columns, mask=m_p, other=0.0)
        m = tl.where(o_k[:, None] == columns, 1.5, 0.0) - 0.5 * p
        sums = tl.dot(a, m, sums, input_precision="tf32x3")
    if SCALED:
        factor = tl.load(factor_ptr + batch)
        sums = tl.where(factor == 0.0, 0.0, sums * factor)
    if i == j:
        sums = (sums + tl.trans(sums)) * 0.5
    inside = (rows < width) & (columns < width)
    tl.store(c_ptr + base + rows * width + columns, sums, mask=inside)
    p_mirror = c_ptr + base + o_j.to(tl.int64)[:, None] * width + o_i[None, :]
    tl.store(p_mirror, tl.trans(sums), mask=(o_j < width)[:, None] & (o_i < width)[None, :])


def on_chip_width(width: int) -> int:
    """BLOCK_D of a matrix that one program holds."""
    return max(16, triton.next_power_of_2(width))


def launch(s: torch.Tensor, iterations: int, inverse: bool) -> torch.Tensor:
    """The root or its inverse [B, D, D]; the contract is that of `matrix_sqrt`."""
    batch, width, _ = s.shape
    out = torch.empty(s.shape, dtype=torch.float32, device=s.device)
    if s.numel() == 0:
        return out
    with torch.cuda.device_of(s):
        if width <= ON_CHIP:
            block = on_chip_width(width)
            whole_kernel[(batch,)](s, out, width, iterations, *s.stride(), INVERSE=inverse, BLOCK_D=block)
        else:
            _tiled(s, iterations, inverse, out)
    return out


def _tiled(s: torch.Tensor, iterations: int, inverse: bool, out: torch.Tensor) -> None:
    batch, width, _ = s.shape
    tiles = triton.cdiv(width, TILE)
    pairs = tiles * (tiles + 1) // 2
    exact = s.double()
    trace = exact.diagonal(dim1=1, dim2=2).sum(1) + 0 * exact.sum((1, 2))  # NaN where anything is not finite
    roots = trace.rsqrt() if inverse else trace.sqrt()
    factor = torch.where(trace == 0, 0.0, roots).float()
    p = ((exact + exact.mT) / torch.where(trace == 0, 1.0, 2 * trace)[:, None, None]).float().contiguous()

    def multiply(a: torch.Tensor, p: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        product_kernel[(batch * pairs,)](
            a, p, c, factor, width, pairs, SCALED=c is out, BLOCK_D=TILE, BLOCK_K=TILE_K, num_warps=8
        )
        return c

    if inverse:
        x = torch.mul(p, -0.5)
        x.diagonal(dim1=1, dim2=2).add_(1.5)
    if iterations == 1:
        if inverse:
            out.copy_(torch.where(trace[:, None, None] == 0, 0.0, x * factor[:, None, None]))
        else:
            multiply(p, p, out)
        return
    spare = [torch.empty_like(out) for _ in range(2)]
    if not inverse:
        x = multiply(p, p, torch.empty_like(out))
    for step in range(1, iterations):
        half = x if step == 1 and not inverse else multiply(p, p, spare.pop())
        following = multiply(half, p, spare.pop())
        spare.append(p)
        if half is not x:
            spare.append(half)
        p = following
        if step == iterations - 1:
            multiply(x, p, out)
        else:
            before, x = x, multiply(x, p, spare.pop())
            spare.append(before)


def _static() -> list[StaticKernel]:
    made = [
        StaticKernel(
            whole_kernel, {"s_ptr": dtype}, constants={"INVERSE": inverse, "BLOCK_D": block, "stride_c": 1},
        )
        for dtype, inverse, block in (("*fp32", False, 32), ("*bf16", True, 32), ("*fp16", True, 16))
    ]  # fmt: skip
    made += [
        StaticKernel(
            product_kernel, constants={"SCALED": scaled, "BLOCK_D": TILE, "BLOCK_K": TILE_K}, num_warps=8,
        )
        for scaled in (False, True)
    ]  # fmt: skip
    return made


STATIC = _static()
