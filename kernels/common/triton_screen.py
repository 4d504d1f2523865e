"""Rows as float16 operands for tensor cores, with what a proof needs: norms and residuals of the rounded rows.

A row x becomes `hi` (and `lo`): float16 with hi * descale (+ lo * descale) close to (x - centre) / unit. `centre` and
`unit` (a power of two) are common to all rows and come from a sample of the database, so they change no distance and
no result depends on which queries share a batch. `descale` is a power of two of the row alone. With hi only the rounded
row has 11 bits, with hi + lo 22; `residual` is the length of what rounding dropped, as it was, not as it might be.

Sizes are `do_not_specialize`, but strides and the number of channels are not: a unit stride and channels that divide by
16 are what lets loads be 16 bytes wide, and both belong to the model, not to the batch.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

SAMPLE = 64  # rows that centre and unit are taken from
BLOCK_R, BLOCK_C = 4, 256
BLOCK_K = {False: 64, True: 32}  # tile of the products along the channels, by whether there is a `lo`


@triton.jit
def load_row_tile(x_ptr, o_rows, m_rows, o_c, patches, channels, stride_i, stride_p, stride_c):
    """Tile [rows, channels] of a tensor [images, patches, channels] with any strides, as float32; masked: 0."""
    image = o_rows // patches
    p_row = image.to(tl.int64) * stride_i + (o_rows - image * patches).to(tl.int64) * stride_p
    p_tile = x_ptr + p_row[:, None] + o_c.to(tl.int64)[None, :] * stride_c
    mask = m_rows[:, None] & (o_c < channels)[None, :]
    return tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def centred_tile(x_ptr, centre_ptr, inverse_unit, o_rows, m_rows, o_c, patches, channels, stride_i, stride_p, stride_c):
    """(x - centre) / unit; the multiplication by a power of two comes first, so that the difference cannot overflow."""
    x = load_row_tile(x_ptr, o_rows, m_rows, o_c, patches, channels, stride_i, stride_p, stride_c)
    centre = tl.load(centre_ptr + o_c, mask=o_c < channels, other=0.0)
    inside = m_rows[:, None] & (o_c < channels)[None, :]
    return tl.where(inside, x * inverse_unit - (centre * inverse_unit)[None, :], 0.0)


@triton.jit
def power_of_two(exponent):
    """2 ** exponent for -126 <= exponent <= 127, exactly."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["first", "rows", "patches", "k_tiles"])
def encode_kernel(
    x_ptr, centre_ptr, unit_ptr, hi_ptr, lo_ptr, half_norm_ptr, descale_ptr, length_ptr, residual_ptr,
    first, rows, patches, channels, k_tiles, stride_i, stride_p, stride_c,
    SPLIT: tl.constexpr, NORMALIZE: tl.constexpr, NORMS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Encode rows `first` to `first + rows` of x; half_norm is inf where a row is not finite, descale a power of 2."""
    o_out = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_rows = o_out < rows
    o_rows = first + o_out
    inverse_unit = 1.0 / tl.load(unit_ptr)
    largest = tl.zeros((BLOCK_R,), tl.float32)
    valid = m_rows
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        x = centred_tile(x_ptr, centre_ptr, inverse_unit, o_rows, m_rows, o_c, patches, channels,
                         stride_i, stride_p, stride_c)  # fmt: skip
        finite = tl.abs(x) < float("inf")  # false for NaN
        valid = valid & (tl.min(finite.to(tl.int32), 1) > 0)
        largest = tl.maximum(largest, tl.max(tl.where(finite, tl.abs(x), 0.0), 1))
    exponent = tl.maximum((largest.to(tl.int32, bitcast=True) >> 23) - 127, -110)
    scale = power_of_two(13 - exponent)  # the largest entry lands in [2^13, 2^14)
    descale = power_of_two(exponent - 13)
    if NORMALIZE:
        norm2 = tl.zeros((BLOCK_R,), tl.float32)
        for begin in range(0, channels, BLOCK_C):
            o_c = begin + tl.arange(0, BLOCK_C)
            x = centred_tile(x_ptr, centre_ptr, inverse_unit, o_rows, m_rows, o_c, patches, channels,
                             stride_i, stride_p, stride_c)  # fmt: skip
            x = tl.where(valid[:, None], x, 0.0) * scale[:, None]
            norm2 += tl.sum(x * x, 1)
        scale = tl.where(norm2 > 0.0, scale * 8192.0 / tl.sqrt(norm2), 0.0)
        descale = tl.full((BLOCK_R,), 1.0 / 8192.0, tl.float32)
    norm2 = tl.zeros((BLOCK_R,), tl.float32)
    dropped2 = tl.zeros((BLOCK_R,), tl.float32)
    width = k_tiles * BLOCK_K
    for begin in range(0, width, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        x = centred_tile(x_ptr, centre_ptr, inverse_unit, o_rows, m_rows, o_c, patches, channels,
                         stride_i, stride_p, stride_c)  # fmt: skip
        x = tl.where(valid[:, None], x, 0.0) * scale[:, None]
        hi = x.to(tl.float16)
        p_out = o_out.to(tl.int64)[:, None] * width + o_c[None, :]
        m_out = m_rows[:, None] & (o_c < width)[None, :]
        tl.store(hi_ptr + p_out, hi, mask=m_out)
        rounded = hi.to(tl.float32)
        if SPLIT:
            lo = (x - rounded).to(tl.float16)
            tl.store(lo_ptr + p_out, lo, mask=m_out)
            rounded += lo.to(tl.float32)
        rounded = rounded * descale[:, None]
        rest = x * descale[:, None] - rounded
        norm2 += tl.sum(rounded * rounded, 1)
        dropped2 += tl.sum(rest * rest, 1)
    half_norm = norm2 * 0.5 if NORMS else tl.zeros((BLOCK_R,), tl.float32)
    tl.store(half_norm_ptr + o_out, tl.where(valid, half_norm, float("inf")), mask=m_rows)
    tl.store(descale_ptr + o_out, descale, mask=m_rows)
    tl.store(length_ptr + o_out, tl.sqrt(norm2), mask=m_rows)
    tl.store(residual_ptr + o_out, tl.sqrt(dropped2), mask=m_rows)


@dataclass(frozen=True)
class Frame:
    """The origin and unit in which rows are compared: `centre` [C] and `unit` [1], float32, on the device."""

    centre: torch.Tensor
    unit: torch.Tensor


@dataclass(frozen=True)
class Encoded:
    """Rows as float16 operands; every tensor but hi and lo is [rows] float32. `lo` is `hi` where there is none."""

    hi: torch.Tensor
    lo: torch.Tensor
    half_norm: torch.Tensor
    descale: torch.Tensor
    length: torch.Tensor
    residual: torch.Tensor
    split: bool

    @property
    def k_tiles(self) -> int:
        """Width of the operands in tiles of the products."""
        return self.hi.shape[1] // BLOCK_K[self.split]

    @property
    def rounding(self) -> float:
        """Bound on |computed - exact| / (|x| |y|) of a product of rounded rows, tensor-core accumulation included.

        Every step adds 16 products; 2^-22 of the largest partial sum is twice what float32 truncation loses. 64 stands
        for the rest: the lo * lo term that is left out (2^-22), centring, scaling and the epilogue (2^-23 each).
        """
        steps = self.k_tiles * BLOCK_K[self.split] // 16 * (3 if self.split else 1)
        return (steps + 64) * 2.0**-22


def as_images(x: torch.Tensor) -> torch.Tensor:
    """[n, C] as one image [1, n, C]; [N, P, C] as it is. Strides are kept."""
    return x if x.dim() == 3 else x[None]


def choose_frame(database: torch.Tensor, centred: bool) -> Frame:
    """Centre and unit from 64 rows spread over `database`: medians, so that no outlier can spoil them.

    Half-precision columns are centred only where they are far from the origin, by a value of their own dtype: there the
    difference is exact, elsewhere the value itself is.
    """
    images = as_images(database)
    patches = images.shape[1]
    total = images.shape[0] * patches
    rows = torch.arange(min(SAMPLE, total), device=images.device) * max(1, total // SAMPLE)
    sample = images[rows // patches, rows % patches].float()
    sample = torch.where(sample.isfinite().all(1, keepdim=True), sample, torch.nan)
    centre = torch.zeros_like(sample[0])
    if centred:
        centre = sample.nanmedian(0).values
        if database.dtype != torch.float32:
            spread = (sample - centre).abs().nanmedian(0).values
            centre = torch.where(centre.abs() > 4 * spread, centre, 0.0)
        centre = centre.nan_to_num()
    top = (sample - centre).abs().amax(1)
    unit = top.nanmedian().nan_to_num()
    unit = torch.where(unit > 0, unit, top.nan_to_num().amax())
    unit = torch.where(unit > 0, unit.clamp(2.0**-100, 2.0**100), 1.0)
    return Frame(centre.contiguous(), (unit / torch.frexp(unit).mantissa).reshape(1))


def encode(
    x: torch.Tensor, frame: Frame, *, split: bool, norms: bool, normalize: bool = False, first: int = 0, rows: int = -1
) -> Encoded:
    """Encode rows `first` to `first + rows` of x [N, P, C] or [n, C].

    Args:
        split: 22 bits (hi + lo) instead of 11.
        norms: half_norm holds half the squared length (distances) instead of 0 (inner products).
        normalize: rows are divided by their length first; needs a frame that is not centred.
    """
    images = as_images(x)
    _, patches, channels = images.shape
    rows = images.shape[0] * patches - first if rows < 0 else rows
    k_tiles = triton.cdiv(max(channels, 1), BLOCK_K[split])
    width = k_tiles * BLOCK_K[split]
    hi = torch.empty(rows, width, dtype=torch.float16, device=x.device)
    lo = torch.empty_like(hi) if split else hi
    half_norm, descale, length, residual = (torch.empty(rows, dtype=torch.float32, device=x.device) for _ in range(4))
    if rows:
        encode_kernel[(triton.cdiv(rows, BLOCK_R),)](
            images, frame.centre, frame.unit, hi, lo, half_norm, descale, length, residual, first, rows, patches,
            channels, k_tiles, *images.stride(), SPLIT=split, NORMALIZE=normalize, NORMS=norms, BLOCK_K=BLOCK_K[split],
            BLOCK_R=BLOCK_R, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return Encoded(hi, lo, half_norm, descale, length, residual, split)


@triton.jit
def tile_products(
    x_hi_ptr, x_lo_ptr, y_hi_ptr, y_lo_ptr, x_first, m_m, y_first, m_n, k_tiles,
    SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Products of encoded rows x_first.. and y_first.., accumulated in float32; masked rows give 0.

    The first element is addressed in 64 bits, the tile from there in 32: half the registers of 64-bit addresses.
    """
    o_k = tl.arange(0, BLOCK_K)
    stride = k_tiles * BLOCK_K
    o_x = tl.arange(0, BLOCK_M)[:, None] * stride + o_k[None, :]
    o_y = tl.arange(0, BLOCK_N)[None, :] * stride + o_k[:, None]
    x_base = stride.to(tl.int64) * x_first
    y_base = stride.to(tl.int64) * y_first
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in range(k_tiles):
        x = tl.load(x_hi_ptr + x_base + o_x, mask=m_m[:, None], other=0.0)
        y = tl.load(y_hi_ptr + y_base + o_y, mask=m_n[None, :], other=0.0)
        if SPLIT:
            x_lo = tl.load(x_lo_ptr + x_base + o_x, mask=m_m[:, None], other=0.0)
            y_lo = tl.load(y_lo_ptr + y_base + o_y, mask=m_n[None, :], other=0.0)
            acc = tl.dot(x_lo, y, acc)
            acc = tl.dot(x, y_lo, acc)
        acc = tl.dot(x, y, acc)
        x_base += BLOCK_K
        y_base += BLOCK_K
    return acc


@triton.jit
def proven_error(x_length, x_rest, y_length, y_rest, rounding):
    """Bound on the error of a rank: what rounding dropped of either row, accumulation, the sum of squares of y."""
    reach = y_length + y_rest
    error = (x_length + reach) * y_rest + x_rest * reach + rounding * x_length * y_length
    return error + 1e-6 * y_length * y_length


_ENCODE = {"x_ptr": "*fp32", "hi_ptr": "*fp16", "lo_ptr": "*fp16"}
STATIC = [
    StaticKernel(
        encode_kernel,
        pointers={**_ENCODE, "x_ptr": x},
        constants={"SPLIT": split, "NORMALIZE": normalize, "NORMS": not normalize, "BLOCK_K": BLOCK_K[split],
                   "BLOCK_R": BLOCK_R, "BLOCK_C": BLOCK_C, "stride_c": 1},
    )
    for x, split, normalize in (("*fp32", True, False), ("*bf16", False, False), ("*fp32", True, True))
]  # fmt: skip
