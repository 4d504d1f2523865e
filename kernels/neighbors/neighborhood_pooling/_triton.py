"""Neighbourhood pooling on the GPU: one read for the statistics of each image, one for windows and row lengths.

Statistics are float32 about a pivot (the image's first entry) and merged tile by tile (Chan): a large mean loses
nothing and a constant image has variance exactly 0. Partial results go through a small workspace in a fixed order: no
atomics, every run gives the same bits. A window is read size^2 times, from L1 but for the first time in each row.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

CHUNKS = 64  # programs that share the statistics of an image
STATS_P, STATS_C = 8, 256
POOL_ELEMENTS, POOL_C = 4096, 2048
EPSILON = tl.constexpr(1e-5)  # of the LayerNorm
SHORTEST = tl.constexpr(1e-12)  # rows are divided by their length or by this


@triton.jit
def merge(count, mean, spread, more_count, more_mean, more_spread):
    """Chan's merge of two (count, mean, sum of squared deviations)."""
    total = count + more_count
    share = tl.where(total > 0.0, more_count / tl.maximum(total, 1.0), 0.0)
    delta = more_mean - mean
    return total, mean + delta * share, spread + more_spread + delta * delta * count * share


@triton.jit(do_not_specialize=["patches", "run"])
def statistics_kernel(
    x_ptr, partial_ptr, patches, channels, run, stride_i, stride_p, stride_c,
    CHUNKS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """partial[image, chunk] = (count, mean - pivot, sum of squared deviations) of `run` patches."""
    image = tl.program_id(0) // CHUNKS
    chunk = tl.program_id(0) % CHUNKS
    p_image = x_ptr + image.to(tl.int64) * stride_i
    pivot = tl.load(p_image).to(tl.float32)
    count, mean, spread = 0.0, 0.0, 0.0
    begin = chunk * run
    end = tl.minimum(begin + run, patches)
    for first in range(begin, end, BLOCK_P):
        o_p = first + tl.arange(0, BLOCK_P)
        for start in range(0, channels, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            mask = (o_p < end)[:, None] & (o_c < channels)[None, :]
            p_tile = p_image + o_p.to(tl.int64)[:, None] * stride_p + o_c.to(tl.int64)[None, :] * stride_c
            x = tl.where(mask, tl.load(p_tile, mask=mask, other=0.0).to(tl.float32) - pivot, 0.0)
            entries = (tl.minimum(end - first, BLOCK_P) * tl.minimum(channels - start, BLOCK_C)).to(tl.float32)
            tile_mean = tl.sum(x) / entries
            deviation = tl.where(mask, x - tile_mean, 0.0)
            count, mean, spread = merge(count, mean, spread, entries, tile_mean, tl.sum(deviation * deviation))
    p_partial = partial_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(p_partial, count)
    tl.store(p_partial + 1, mean)
    tl.store(p_partial + 2, spread)


@triton.jit
def window_sum(p_image, shift, o_y, o_x, m_x, o_c, height, width, channels, stride_p, stride_c, half):
    """[positions, channels]: sum of (x - shift) over the window around (o_y, o_x); positions outside count as 0."""
    m_c = o_c < channels
    total = tl.zeros((o_x.shape[0], o_c.shape[0]), tl.float32)
    for y in range(tl.maximum(o_y - half, 0), tl.minimum(o_y + half + 1, height)):
        for dx in range(-half, half + 1):
            x = o_x + dx
            inside = (m_x & (x >= 0) & (x < width))[:, None] & m_c[None, :]
            p_tile = p_image + (y * width + x).to(tl.int64)[:, None] * stride_p + o_c.to(tl.int64)[None, :] * stride_c
            value = tl.load(p_tile, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(inside, value - shift[0] - shift[1], 0.0)
    return total


@triton.jit(do_not_specialize=["height", "width", "size", "strips"])
def pool_kernel(
    x_ptr, partial_ptr, out_ptr, height, width, channels, size, strips, stride_i, stride_p, stride_c,
    CHUNKS: tl.constexpr, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr, ONE_BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK_X positions of one line of the grid of one image; ONE_BLOCK: BLOCK_C holds all channels."""
    strip = tl.program_id(0) % strips
    line = tl.program_id(0) // strips
    image = line // height
    o_y = line - image * height
    o_chunk = tl.arange(0, CHUNKS)
    p_partial = partial_ptr + (image * CHUNKS + o_chunk).to(tl.int64) * 3
    everywhere = o_chunk < CHUNKS
    count = tl.load(p_partial, mask=everywhere, other=0.0)
    mean = tl.load(p_partial + 1, mask=everywhere, other=0.0)
    spread = tl.load(p_partial + 2, mask=everywhere, other=0.0)
    entries = tl.sum(count)
    mean_all = tl.sum(mean * (count / entries))
    variance = (tl.sum(spread) + tl.sum(count * (mean - mean_all) * (mean - mean_all))) / entries
    factor = 1.0 / tl.sqrt(variance + EPSILON) / (size * size).to(tl.float32)
    p_image = x_ptr + image.to(tl.int64) * stride_i
    pivot = tl.load(p_image).to(tl.float32)
    shift = (pivot, mean_all)
    o_x = strip * BLOCK_X + tl.arange(0, BLOCK_X)
    m_x = o_x < width
    norm2 = tl.zeros((BLOCK_X,), tl.float32)
    p_out = out_ptr + (line.to(tl.int64) * width + o_x)[:, None] * channels
    if ONE_BLOCK:
        o_c = tl.arange(0, BLOCK_C)
        value = factor * window_sum(
            p_image, shift, o_y, o_x, m_x, o_c, height, width, channels, stride_p, stride_c, size // 2
        )
        length = tl.sqrt(tl.sum(value * value, 1))
        length = tl.where(length < SHORTEST, SHORTEST, length)  # NaN stays
        mask = m_x[:, None] & (o_c < channels)[None, :]
        tl.store(p_out + o_c[None, :], (value / length[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        for start in range(0, channels, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            value = factor * window_sum(
                p_image, shift, o_y, o_x, m_x, o_c, height, width, channels, stride_p, stride_c, size // 2
            )
            norm2 += tl.sum(value * value, 1)
        length = tl.sqrt(norm2)
        length = tl.where(length < SHORTEST, SHORTEST, length)
        for start in range(0, channels, BLOCK_C):
            o_c = start + tl.arange(0, BLOCK_C)
            value = factor * window_sum(
                p_image, shift, o_y, o_x, m_x, o_c, height, width, channels, stride_p, stride_c, size // 2
            )
            mask = m_x[:, None] & (o_c < channels)[None, :]
            tl.store(p_out + o_c[None, :], (value / length[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def pool_tile(channels: int) -> tuple[int, int]:
    """(BLOCK_X, BLOCK_C) for rows of `channels`."""
    block_c = min(POOL_C, max(32, triton.next_power_of_2(channels)))
    return min(16, POOL_ELEMENTS // block_c), block_c


def launch(features: torch.Tensor, height: int, width: int, size: int) -> torch.Tensor:
    """Unit rows [N, P, C] of the dtype of features; the contract is that of `pool_neighborhood`."""
    images, patches, channels = features.shape
    out = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    if out.numel() == 0:
        return out
    block_x, block_c = pool_tile(channels)
    strips = triton.cdiv(width, block_x)
    with torch.cuda.device_of(features):
        partial = torch.empty(images, CHUNKS, 3, dtype=torch.float32, device=features.device)
        statistics_kernel[(images * CHUNKS,)](
            features, partial, patches, channels, triton.cdiv(patches, CHUNKS), *features.stride(),
            CHUNKS=CHUNKS, BLOCK_P=STATS_P, BLOCK_C=STATS_C, num_warps=4,
        )  # fmt: skip
        pool_kernel[(images * height * strips,)](
            features, partial, out, height, width, channels, size, strips, *features.stride(),
            CHUNKS=CHUNKS, BLOCK_X=block_x, BLOCK_C=block_c, ONE_BLOCK=channels <= block_c, num_warps=4,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    made = []
    for dtype, channels in (("*fp16", 1024), ("*fp32", 96), ("*bf16", 4096)):
        block_x, block_c = pool_tile(channels)
        tile = {"CHUNKS": CHUNKS, "stride_c": 1}
        pointers = {"x_ptr": dtype, "out_ptr": dtype}
        made += [
            StaticKernel(statistics_kernel, pointers, constants={**tile, "BLOCK_P": STATS_P, "BLOCK_C": STATS_C}),
            StaticKernel(pool_kernel, pointers, constants={**tile, "BLOCK_X": block_x, "BLOCK_C": block_c,
                                                           "ONE_BLOCK": channels <= block_c}),
        ]  # fmt: skip
    return made


STATIC = _static()
