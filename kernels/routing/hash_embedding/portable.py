"""The hashes by their bits: TensorRT neither shifts integers nor takes their exclusive or."""

import torch
from torch.nn import functional as F

from planmill.kernels.routing.hash_embedding.reference import FIRST, SECOND, pooled_rows

BITS, LIMBS, WIDTH = 64, 4, 16  # of a word; products of limbs stay below 2^35


def bits_of(z: torch.Tensor) -> torch.Tensor:
    """Bits [..., 64], lowest first, of int64 z as an unsigned number; 0 or 1 in int64."""
    negative = z < 0
    rest = torch.where(negative, z - torch.iinfo(torch.int64).min, z)  # the bit of the sign taken off
    return torch.cat((_split(rest, BITS)[..., :-1], negative[..., None].long()), -1)


def _split(z: torch.Tensor, count: int) -> torch.Tensor:
    """The lowest bits [..., count], a power of two of them, of z, which is not negative: halves of halves."""
    z = z[..., None]
    while count > 1:
        count //= 2
        high = z // (1 << count)
        z = torch.stack((z - high * (1 << count), high), -1).flatten(-2)
    return z


def _limbs(bits: torch.Tensor) -> torch.Tensor:
    """Bits [..., 64] as limbs [..., 4] of 16 bits each."""
    size = 1
    while size < WIDTH:
        low, high = bits.unflatten(-1, (-1, 2)).unbind(-1)
        bits, size = low + high * (1 << size), 2 * size
    return bits


def _xor_shift(bits: torch.Tensor, by: int) -> torch.Tensor:
    return (bits != F.pad(bits[..., by:], (0, by))).long()


def _times(bits: torch.Tensor, factor: int) -> torch.Tensor:
    """Bits of the product with a constant, modulo 2^64."""
    limbs = _limbs(bits).unbind(-1)
    factors = [(factor >> (WIDTH * i)) & 0xFFFF for i in range(LIMBS)]
    carry, found = torch.zeros_like(limbs[0]), []
    for i in range(LIMBS):
        total = carry + sum(limbs[j] * factors[i - j] for j in range(i + 1))
        carry = total // (1 << WIDTH)
        found.append(_split(total - carry * (1 << WIDTH), WIDTH))
    return torch.cat(found, -1)


def mix_bits(bits: torch.Tensor) -> torch.Tensor:
    """See `mix` of the reference."""
    return _xor_shift(_times(_xor_shift(_times(_xor_shift(bits, 30), FIRST), 27), SECOND), 31)


def hash_rows_portable(values: torch.Tensor, seeds: torch.Tensor, rows: int) -> torch.Tensor:
    """See `hash_rows` of the reference."""
    h = mix_bits((mix_bits(bits_of(values)) != bits_of(seeds)).long())
    limbs = _limbs(h).unbind(-1)
    total = limbs[0] * rows
    for limb in limbs[1:]:  # floor(h M / 2^64), 16 bits after another
        total = limb * rows + total // (1 << WIDTH)
    return total // (1 << WIDTH)


def hash_embedding_portable(
    values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor,
    features: torch.Tensor, mean: bool,
) -> torch.Tensor:  # fmt: skip
    """See the reference; in float32."""
    rows = hash_rows_portable(values[:, features.long()], seeds[:, None], table.shape[0])
    return pooled_rows(rows, lengths, weights, table, features, mean)
