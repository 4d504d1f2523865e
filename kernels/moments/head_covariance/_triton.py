"""head_covariance on the GPU: heads normalised once, then one program a tile of a pair's product.

The first kernel normalises each head's tokens and adds them up by chunks, relative to the first token; the second takes
the centre off while it loads, multiplies (three tf32 products of the high and low halves of each number: float32's
accuracy) and, where one tile holds the matrix, divides the columns by their lengths; a third does so for wider heads.
No atomics: equal inputs give equal bits. What is multiplied lies head by head, [B, heads, T, d] float32.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.moments.head_covariance.reference import pair_heads

TILE_I, TILE_J = 128, 64  # channels of a tile: rows and columns
TILE_T = 16
ROWS = 32
EPSILON = tl.constexpr(1e-12)


@triton.jit
def normalised(
    p_rows, o_n, m_n, p_weight, p_bias, width, eps, stride_n, stride_c, NORM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Tokens o_n of a head [BLOCK_N, BLOCK_D] float32, after their LayerNorm; zero beyond d."""
    o_d = tl.arange(0, BLOCK_D)
    inside = (o_d < width)[None, :]
    p = p_rows + o_n.to(tl.int64)[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_c
    x = tl.load(p, mask=m_n[:, None] & inside, other=0.0).to(tl.float32)
    if NORM:
        mean = tl.sum(x, 1) / width
        mean += tl.sum(tl.where(inside, x - mean[:, None], 0.0), 1) / width
        z = tl.where(inside, x - mean[:, None], 0.0)
        z = z / tl.sqrt_rn(tl.sum(z * z, 1) / width + eps)[:, None]
        weight = tl.load(p_weight + o_d, mask=o_d < width, other=0.0)
        x = z * weight[None, :] + tl.load(p_bias + o_d, mask=o_d < width, other=0.0)[None, :]
    return x


@triton.jit(do_not_specialize=["tokens", "heads", "width", "chunks", "eps"])
def normalise_kernel(
    x_ptr, weight_ptr, bias_ptr, z_ptr, sums_ptr, tokens, heads, width, chunks, eps,
    stride_b, stride_n, stride_h, stride_c, NORM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Of one head and BLOCK_N tokens: z, and the sum of z less that of the first token."""
    chunk = tl.program_id(0) % chunks
    head = tl.program_id(0) // chunks % heads
    batch = (tl.program_id(0) // chunks // heads).to(tl.int64)
    o_n, o_d = chunk * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    m_n = o_n < tokens
    p_rows = x_ptr + batch * stride_b + head.to(tl.int64) * stride_h
    z = normalised(p_rows, o_n, m_n, weight_ptr, bias_ptr, width, eps, stride_n, stride_c, NORM, BLOCK_D)
    o_first = tl.arange(0, 1)
    first = normalised(
        p_rows, o_first, o_first < tokens, weight_ptr, bias_ptr, width, eps, stride_n, stride_c, NORM, BLOCK_D
    )
    p_head = z_ptr + (batch * heads + head) * tokens * width
    mask = m_n[:, None] & (o_d < width)[None, :]
    tl.store(p_head + o_n.to(tl.int64)[:, None] * width + o_d[None, :], z, mask=mask)
    total = tl.sum(tl.where(m_n[:, None], z - first, 0.0), 0)
    tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * width + o_d, total, mask=o_d < width)


@triton.jit
def pair_of(pair, heads, PAIRING: tl.constexpr):
    """(i, j) of pair `pair`, counted as `pair_heads` does."""
    i, j = pair, pair + 1
    if PAIRING == "first":
        i = pair * 0
    if PAIRING == "halves":
        j = pair + heads // 2
    if PAIRING == "all":
        i, rest = pair * 0, pair
        for row in range(0, heads - 1):
            here = (i == row) & (rest >= heads - 1 - row)
            rest = tl.where(here, rest - (heads - 1 - row), rest)
            i = tl.where(here, row + 1, i)
        j = i + 1 + rest
    return i, j


@triton.jit(do_not_specialize=["tokens", "heads", "width", "pairs", "row_tiles", "column_tiles"])
def product_kernel(
    z_ptr, centre_ptr, out_ptr, tokens, heads, width, pairs, row_tiles, column_tiles,
    PAIRING: tl.constexpr, CENTRED: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr,
    BLOCK_J: tl.constexpr,
):  # fmt: skip
    """One tile of one pair: (X_i - centre)^T (X_j - centre) / T; NORMALIZE where it holds whole columns."""
    j = tl.program_id(0) % column_tiles
    i = tl.program_id(0) // column_tiles % row_tiles
    pair = tl.program_id(0) // column_tiles // row_tiles % pairs
    batch = (tl.program_id(0) // column_tiles // row_tiles // pairs).to(tl.int64)
    left, right = pair_of(pair, heads, PAIRING)
    left, right = batch * heads + left, batch * heads + right
    o_i, o_j = i * BLOCK_I + tl.arange(0, BLOCK_I), j * BLOCK_J + tl.arange(0, BLOCK_J)
    m_i, m_j = o_i < width, o_j < width
    sums = tl.zeros((BLOCK_I, BLOCK_J), tl.float32)
    for start in range(0, tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = (o_n < tokens)[:, None]
        rows = o_n.to(tl.int64)[:, None] * width
        a = tl.load(z_ptr + left * tokens * width + rows + o_i[None, :], mask=m_n & m_i[None, :], other=0.0)
        b = tl.load(z_ptr + right * tokens * width + rows + o_j[None, :], mask=m_n & m_j[None, :], other=0.0)
        if CENTRED:
            a = tl.where(m_n, a - tl.load(centre_ptr + left * width + o_i, mask=m_i, other=0.0)[None, :], 0.0)
            b = tl.where(m_n, b - tl.load(centre_ptr + right * width + o_j, mask=m_j, other=0.0)[None, :], 0.0)
        sums = tl.dot(tl.trans(a), b, sums, input_precision="tf32x3")
    c = sums / tokens
    if NORMALIZE:
        largest = tl.max(tl.abs(c), 0)
        unit = tl.where(largest > 0.0, largest, 1.0)
        part = c / unit[None, :]
        squares = tl.sum(part * part, 0)
        length = tl.maximum(tl.sqrt_rn(squares) * unit, EPSILON)
        c = c / tl.where(squares == squares, length, squares)[None, :]
    p_out = out_ptr + (batch * pairs + pair) * width * width + o_i.to(tl.int64)[:, None] * width + o_j[None, :]
    tl.store(p_out, c, mask=m_i[:, None] & m_j[None, :])


@triton.jit(do_not_specialize=["width", "blocks"])
def length_kernel(out_ptr, width, blocks, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):
    """Divide BLOCK_D columns of one matrix by their lengths, in place."""
    o_d = tl.program_id(0) % blocks * BLOCK_D + tl.arange(0, BLOCK_D)
    p_columns = out_ptr + (tl.program_id(0) // blocks).to(tl.int64) * width * width + o_d[None, :]
    largest = tl.zeros((BLOCK_D,), tl.float32)
    unknown = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, width, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        mask = (o_r < width)[:, None] & (o_d < width)[None, :]
        c = tl.load(p_columns + o_r.to(tl.int64)[:, None] * width, mask=mask, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(c), 0))
        unknown += tl.sum(tl.where(c == c, 0.0, 1.0), 0)
    unit = tl.where(largest > 0.0, largest, 1.0)
    squares = tl.zeros((BLOCK_D,), tl.float32)
    for first in range(0, width, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        mask = (o_r < width)[:, None] & (o_d < width)[None, :]
        part = tl.load(p_columns + o_r.to(tl.int64)[:, None] * width, mask=mask, other=0.0) / unit[None, :]
        squares += tl.sum(part * part, 0)
    length = tl.maximum(tl.sqrt_rn(squares) * unit, EPSILON)
    length = tl.where(unknown > 0.0, float("nan"), length)
    for first in range(0, width, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        mask = (o_r < width)[:, None] & (o_d < width)[None, :]
        c = tl.load(p_columns + o_r.to(tl.int64)[:, None] * width, mask=mask, other=0.0)
        tl.store(p_columns + o_r.to(tl.int64)[:, None] * width, c / length[None, :], mask=mask)


def chunk_tokens(block: int) -> int:
    """Tokens that a program normalises: 4096 numbers."""
    return max(2, 4096 // block)


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int, eps: float, centering: str, pairing: str,
    interleaved: bool, normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """Matrices [B, P, d, d]; the contract is that of `cross_covariance`."""
    batch, tokens, width = x.shape[0], x.shape[1], x.shape[2] // heads
    pairs = len(pair_heads(heads, pairing))
    if tokens == 0:
        return torch.zeros(batch, pairs, width, width, dtype=torch.float32, device=x.device)
    out = torch.empty(batch, pairs, width, width, dtype=torch.float32, device=x.device)
    if out.numel() == 0:
        return out
    by_head, by_channel = (x.stride(2), heads * x.stride(2)) if interleaved else (width * x.stride(2), x.stride(2))
    norm, block = weight.numel() > 0, max(16, triton.next_power_of_2(width))
    tokens_of = chunk_tokens(block)
    chunks = triton.cdiv(tokens, tokens_of)
    z = torch.empty(batch, heads, tokens, width, dtype=torch.float32, device=x.device)
    sums = torch.empty(batch, heads, chunks, width, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        normalise_kernel[(batch * heads * chunks,)](
            x, weight.contiguous(), bias.contiguous(), z, sums, tokens, heads, width, chunks, eps,
            x.stride(0), x.stride(1), by_head, by_channel, NORM=norm, BLOCK_N=tokens_of, BLOCK_D=block,
        )  # fmt: skip
        centre = z[:, :, 0].double() + sums.sum(2, dtype=torch.float64) / tokens
        if centering == "scalar":
            centre = centre.mean(2, keepdim=True).expand_as(centre)
        centre = centre.float().contiguous()
        tile_i, tile_j = min(TILE_I, block), min(TILE_J, block)
        row_tiles, column_tiles = triton.cdiv(width, tile_i), triton.cdiv(width, tile_j)
        product_kernel[(batch * pairs * row_tiles * column_tiles,)](
            z, centre, out, tokens, heads, width, pairs, row_tiles, column_tiles, PAIRING=pairing,
            CENTRED=centering != "none", NORMALIZE=normalize and row_tiles == 1, BLOCK_N=TILE_T, BLOCK_I=tile_i,
            BLOCK_J=tile_j, num_warps=8 if tile_i == TILE_I else 4, num_stages=2,
        )  # fmt: skip
        if normalize and row_tiles > 1:
            blocks = triton.cdiv(width, TILE_J)
            length_kernel[(batch * pairs * blocks,)](out, width, blocks, BLOCK_R=ROWS, BLOCK_D=TILE_J)
    return out


def _static() -> list[StaticKernel]:
    made = [
        StaticKernel(
            normalise_kernel, {"x_ptr": dtype}, {"eps": "fp32"},
            {"NORM": True, "BLOCK_N": chunk_tokens(block), "BLOCK_D": block, "stride_c": 1},
        )
        for dtype, block in (("*fp32", 128), ("*bf16", 1024))
    ]  # fmt: skip
    made += [
        StaticKernel(
            product_kernel,
            constants={
                "PAIRING": pairing, "CENTRED": True, "NORMALIZE": True, "BLOCK_N": TILE_T, "BLOCK_I": rows,
                "BLOCK_J": min(TILE_J, rows),
            },
            num_warps=8 if rows == TILE_I else 4, num_stages=2,
        )
        for pairing, rows in (("adjacent", TILE_I), ("all", 32))
    ]  # fmt: skip
    return [*made, StaticKernel(length_kernel, constants={"BLOCK_R": ROWS, "BLOCK_D": TILE_J})]


STATIC = _static()
