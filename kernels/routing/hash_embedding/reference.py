"""y = concat over lookups j of the pooled rows E[h_j(v)], h by a 64-bit mix and multiply-shift; sums in float64."""

import torch

LOW = 0xFFFFFFFF
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64  # as signed 64-bit numbers


def _xor_shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))  # the shift of an unsigned number


def mix(z: torch.Tensor) -> torch.Tensor:
    """The finaliser of SplitMix64: a bijection of 64-bit words; int64 products wrap as unsigned ones do."""
    return _xor_shift(_xor_shift(_xor_shift(z, 30) * FIRST, 27) * SECOND, 31)


def hash_rows(values: torch.Tensor, seeds: torch.Tensor, rows: int) -> torch.Tensor:
    """Table row of each value under each seed: floor(mix(mix(v) ^ seed) * M / 2^64), for M < 2^31."""
    h = mix(mix(values) ^ seeds)
    high, low = (h >> 32) & LOW, h & LOW
    return ((high * rows + ((low * rows) >> 32)) >> 32) & LOW


def pooled_rows(
    rows: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, features: torch.Tensor,
    mean: bool,
) -> torch.Tensor:  # fmt: skip
    """[B, J * d] of the table's `rows` [B, J, L]."""
    most, chosen = rows.shape[2], features.long()
    count = lengths[:, chosen].clamp(0, most) if lengths.numel() else torch.full_like(rows[..., 0], most)
    used = torch.arange(most, device=rows.device) < count[..., None]
    found = table.double()[rows]  # E[h_j(v)]: [B, J, L, d]
    if weights.numel():
        found = found * weights.double()[:, chosen][..., None]
    pooled = torch.where(used[..., None], found, 0).sum(2)
    if mean:
        pooled = pooled / count.clamp_min(1)[..., None]
    return pooled.flatten(1).to(table.dtype)


def hash_embedding_reference(
    values: torch.Tensor, lengths: torch.Tensor, weights: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor,
    features: torch.Tensor, mean: bool,
) -> torch.Tensor:  # fmt: skip
    """[B, J * d] of the dtype of the table."""
    rows = hash_rows(values[:, features.long()], seeds[:, None], table.shape[0])
    return pooled_rows(rows, lengths, weights, table, features, mean)
