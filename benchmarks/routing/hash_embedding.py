"""hash_embedding against hashing and looking up in PyTorch. Error: largest difference from float64, of 64 rows."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing import embed_hashed
from planmill.kernels.routing.hash_embedding.reference import hash_embedding_reference, hash_rows

from ..cases import Case, Draw, Peer, plain

FEATURES, ROWS_CHECKED = 26, 64
LIMITS = torch.iinfo(torch.int64)


def make(batch: int, most: int, lookups: int, rows: int, width: int) -> Callable[[Draw], tuple]:
    """26 features, as in click logs, of `lookups` lookups each; up to `most` values per feature."""

    def draw_all(draw: Draw) -> tuple:
        def integers(low: int, high: int, *shape: int) -> torch.Tensor:
            return torch.randint(low, high, shape, generator=draw.generator).to(draw.device)

        values = integers(LIMITS.min, LIMITS.max, batch, FEATURES, most)
        features = torch.arange(FEATURES, dtype=torch.int32).repeat_interleave(lookups).to(draw.device)
        lengths = integers(0, most + 1, batch, FEATURES).int() if most > 1 else None
        return values, draw.normal(rows, width), integers(LIMITS.min, LIMITS.max, len(features)), features, lengths

    return draw_all


def ours(
    values: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor, features: torch.Tensor, lengths: torch.Tensor | None
) -> torch.Tensor:
    """Sums."""
    return embed_hashed(values, table, seeds, features, lengths=lengths)


def at_once(
    values: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor, features: torch.Tensor, lengths: None
) -> torch.Tensor:
    """One hash over all lookups, one lookup."""
    return F.embedding(hash_rows(values[:, features, 0], seeds, len(table)), table).flatten(1)


def one_by_one(
    values: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor, features: torch.Tensor, lengths: None
) -> torch.Tensor:
    """A hash and a lookup for each, then `cat`."""
    found = [hash_rows(values[:, f, 0], seed, len(table)) for f, seed in zip(features.tolist(), seeds, strict=True)]
    return torch.cat([F.embedding(rows, table) for rows in found], 1)


def bags(
    values: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor, features: torch.Tensor, lengths: torch.Tensor
) -> torch.Tensor:
    """Values to lists once per feature, then a hash and an `embedding_bag` per lookup, and `cat`."""
    used = torch.arange(values.shape[2], device=values.device) < lengths[..., None]
    lists = [(values[:, f][used[:, f]], lengths[:, f].cumsum(0) - lengths[:, f]) for f in range(values.shape[1])]
    parts = []
    for f, seed in zip(features.tolist(), seeds, strict=True):
        flat, starts = lists[f]
        parts.append(F.embedding_bag(hash_rows(flat, seed, len(table)), table, starts, mode="sum"))
    return torch.cat(parts, 1)


def check(args: tuple, found: torch.Tensor) -> float:
    """Random rows of the batch."""
    values, table, seeds, features, lengths = args
    rows = torch.randint(len(values), (ROWS_CHECKED,)).to(values.device)
    chosen = torch.empty(0, dtype=torch.int32, device=values.device) if lengths is None else lengths[rows]
    none = torch.empty(0, device=values.device)
    want = hash_embedding_reference(values[rows], chosen, none, table, seeds, features, False)
    return float((found[rows].double() - want.double()).abs().max())


CASES = [
    Case(
        op="hash_embedding",
        id="B8192-F26x2-M1M-d32",
        make=make(8192, 1, 2, 1_000_000, 32),
        small=make(64, 1, 2, 1000, 32),
        ours=ours,
        peers={
            "torch hash per lookup + F.embedding + cat": Peer(plain(one_by_one)),
            "torch hash at once + F.embedding": Peer(plain(at_once)),
        },
        check=check,
        tolerance={torch.float32: 0.0, torch.bfloat16: 0.0},
        dtypes=(torch.float32, torch.bfloat16),
        memory=True,
    ),
    Case(
        op="hash_embedding",
        id="B2048-F26x2-L8-M1M-d32",
        make=make(2048, 8, 2, 1_000_000, 32),
        small=make(64, 8, 2, 1000, 32),
        ours=ours,
        peers={"torch hash per lookup + embedding_bag + cat": Peer(plain(bags))},
        check=check,
        tolerance={torch.float32: 1e-5},
        memory=True,
    ),
]
