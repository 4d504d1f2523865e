"""Inputs of hash_embedding that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import normal, poison_row
from planmill.kernels.common.spec import Case

LIMITS = torch.iinfo(torch.int64)


def values(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Any 64-bit numbers, among them the smallest, the largest and those around 0."""
    drawn = torch.randint(LIMITS.min, LIMITS.max, shape, generator=g)
    edges = torch.tensor([0, -1, 1, LIMITS.min, LIMITS.max])
    drawn.view(-1)[: len(edges)] = edges[: drawn.numel()]
    return drawn


def lookups(g: torch.Generator, *counts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Seeds and features of `counts[f]` lookups of each feature f."""
    features = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts)).int()
    return values(g, len(features)), features


def _one(t: torch.dtype, g: torch.Generator, batch: int, rows: int, width: int, *counts: int) -> tuple:
    """One value per feature, no weights."""
    seeds, features = lookups(g, *counts)
    return (values(g, batch, len(counts), 1), torch.empty(0, dtype=torch.int32), torch.empty(0),
            normal(g, t, rows, width), seeds, features, False)  # fmt: skip


def _many(
    t: torch.dtype, g: torch.Generator, batch: int, most: int, rows: int, width: int, *counts: int,
    mean: bool = False, weighted: bool = False,
) -> tuple:  # fmt: skip
    """Up to `most` values per feature; some features have none."""
    seeds, features = lookups(g, *counts)
    lengths = torch.randint(0, most + 1, (batch, len(counts)), generator=g).int()
    weights = torch.randn(batch, len(counts), most, generator=g) if weighted else torch.empty(0)
    return (values(g, batch, len(counts), most), lengths, weights, normal(g, t, rows, width), seeds, features, mean)


def _unordered(t: torch.dtype, g: torch.Generator) -> tuple:
    args = list(_one(t, g, 7, 50, 12, 1, 2, 1))
    args[5] = torch.tensor([2, 0, 1, 1], dtype=torch.int32)
    return tuple(args)


def _strided(t: torch.dtype, g: torch.Generator) -> tuple:
    args = list(_many(t, g, 9, 4, 60, 12, 1, 2))
    args[0] = args[0].transpose(0, 1).contiguous().transpose(0, 1)
    args[3] = normal(g, t, 12, 120).T[::2]
    return tuple(args)


def _poisoned(t: torch.dtype, g: torch.Generator) -> tuple:
    args = list(_many(t, g, 30, 3, 20, 12, 1, 2))
    args[3] = poison_row(poison_row(args[3], 4), 7, torch.inf)
    return tuple(args)


def cases() -> list[Case]:
    return [
        Case(
            "small",
            lambda t, g: _many(t, g, 5, 3, 11, 8, 1, 2, weighted=True),
            gradient=True,
            compiled=True,
        ),
        Case("one", lambda t, g: _one(t, g, 1, 1, 1, 1)),
        Case("odd", lambda t, g: _one(t, g, 67, 131, 33, 2, 1, 3)),
        Case("across_tiles", lambda t, g: _one(t, g, 700, 5000, 100, 1, 4, 2)),
        Case("wide", lambda t, g: _many(t, g, 5, 4, 40, 1100, 1, 2)),
        Case("sum", lambda t, g: _many(t, g, 40, 6, 300, 40, 1, 2, 1)),
        Case("mean", lambda t, g: _many(t, g, 40, 6, 300, 40, 1, 2, 1, mean=True)),
        Case(
            "weighted_mean",
            lambda t, g: _many(t, g, 40, 6, 300, 40, 1, 2, 1, mean=True, weighted=True),
            gradient=True,
        ),
        Case("no_batch", lambda t, g: _one(t, g, 0, 20, 8, 1, 2)),
        Case("no_values", lambda t, g: _many(t, g, 4, 0, 20, 8, 1, 2)),
        Case("no_lookups", lambda t, g: _one(t, g, 4, 20, 8, 0, 0)),
        Case("unordered", _unordered),
        Case("strided", _strided),
        Case("nan_and_infinity", _poisoned),
        Case("huge", lambda t, g: (*(a := _many(t, g, 9, 3, 20, 12, 1, 2))[:3], a[3] * 1e30, *a[4:]), (torch.float32,)),
    ]  # fmt: skip
