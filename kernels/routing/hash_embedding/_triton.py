"""Hashed lookups on the GPU: one program per row of the batch, lookup and block of the width.

The hash is in registers, the row of the table goes straight to its column of the output: one launch for all features.
Bound by bytes, in sectors of 32: rows of at least 32 bytes waste none.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_L, BLOCK_C = 32, 512  # lookups and columns that one program holds
ELEMENTS = 2048


@triton.jit
def mix(z):
    """The finaliser of SplitMix64; z is uint64."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit(do_not_specialize=["places", "inputs", "most", "lookups", "rows"])
def lookup_kernel(
    values_ptr, lengths_ptr, weights_ptr, table_ptr, seeds_ptr, features_ptr, out_ptr,
    places, inputs, most, lookups, rows, channels, blocks,
    LENGTHS: tl.constexpr, WEIGHTS: tl.constexpr, MEAN: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out [B, J, d], of which `places` = B * J; values are walked in order."""
    block = tl.program_id(0) % blocks
    o_place = (tl.program_id(0) // blocks).to(tl.int64) * BLOCK_L + tl.arange(0, BLOCK_L)
    m_place = o_place < places
    o_place = o_place.to(tl.int32)
    entry = o_place // lookups
    lookup = o_place - entry * lookups
    o_input = entry.to(tl.int64) * inputs + tl.load(features_ptr + lookup, mask=m_place, other=0)
    seed = tl.load(seeds_ptr + lookup, mask=m_place, other=0).to(tl.uint64, bitcast=True)
    count = tl.full((BLOCK_L,), 0, tl.int32) + most
    if LENGTHS:
        count = tl.minimum(tl.maximum(tl.load(lengths_ptr + o_input, mask=m_place, other=0), 0), most)
    count = tl.where(m_place, count, 0)
    o_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < channels
    total = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for k in range(0, tl.max(count, 0)):
        m_value = k < count
        value = tl.load(values_ptr + o_input * most + k, mask=m_value, other=0).to(tl.uint64, bitcast=True)
        h = mix(mix(value) ^ seed)
        m = tl.full((BLOCK_L,), 0, tl.uint64) + tl.cast(rows, tl.uint64)
        row = ((h >> 32) * m + (((h & 0xFFFFFFFF) * m) >> 32)) >> 32
        p_row = table_ptr + row.to(tl.int64)[:, None] * channels + o_c[None, :]
        found = tl.load(p_row, mask=m_value[:, None] & m_c[None, :], other=0.0).to(tl.float32)
        if WEIGHTS:
            weight = tl.load(weights_ptr + o_input * most + k, mask=m_value, other=0.0)
            found = tl.where(m_value[:, None], found * weight[:, None], 0.0)
        total += found
    if MEAN:
        total = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    p_out = out_ptr + o_place.to(tl.int64)[:, None] * channels + o_c[None, :]
    tl.store(p_out, total.to(out_ptr.dtype.element_ty), mask=m_place[:, None] & m_c[None, :])


def tile_of(channels: int) -> tuple[int, int]:
    """(BLOCK_L, BLOCK_C) for rows of `channels`."""
    block_c = min(BLOCK_C, max(16, triton.next_power_of_2(channels)))
    return max(1, min(BLOCK_L, ELEMENTS // block_c)), block_c


def launch(
    values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor,
    features: torch.Tensor, mean: bool,
) -> torch.Tensor:  # fmt: skip
    """[B, J * d] of the dtype of the table; the contract of the op."""
    batch, inputs, most = values.shape
    lookups, channels = seeds.shape[0], table.shape[1]
    out = torch.empty(batch, lookups * channels, dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    block_l, block_c = tile_of(channels)
    blocks = triton.cdiv(channels, block_c)
    with torch.cuda.device_of(table):
        lookup_kernel[(triton.cdiv(batch * lookups, block_l) * blocks,)](
            values.contiguous(), lengths.contiguous(), weights.contiguous(), table.contiguous(), seeds.contiguous(),
            features.contiguous(), out, batch * lookups, inputs, most, lookups, table.shape[0], channels, blocks,
            LENGTHS=lengths.numel() > 0, WEIGHTS=weights.numel() > 0, MEAN=mean, BLOCK_L=block_l, BLOCK_C=block_c,
            num_warps=4,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    integers = {"values_ptr": "*i64", "lengths_ptr": "*i32", "seeds_ptr": "*i64", "features_ptr": "*i32"}
    made = []
    for dtype, channels, several in (("*fp32", 32, False), ("*bf16", 16, True), ("*fp16", 768, True)):
        block_l, block_c = tile_of(channels)
        constants = {"LENGTHS": several, "WEIGHTS": several, "MEAN": several, "BLOCK_L": block_l, "BLOCK_C": block_c}
        made.append(StaticKernel(lookup_kernel, {**integers, "table_ptr": dtype, "out_ptr": dtype}, {}, constants))
    return made


STATIC = _static()
