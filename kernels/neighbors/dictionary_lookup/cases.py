"""Inputs of dictionary_lookup that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from functools import partial

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
Make = Callable[[torch.dtype, torch.Generator], tuple]


def _normal(n: int, m: int, d: int, width: int, scale: float, weighting: str = "sparsemax") -> Make:
    return lambda t, g: (normal(g, t, n, d), normal(g, t, m, d), normal(g, t, m, width), scale, weighting)


def _ties(weighting: str, t: torch.dtype, g: torch.Generator) -> tuple:
    """Integers, and a scale of a power of two: scores are exact, and many of them equal."""
    return integers(g, t, 13, 6), integers(g, t, 600, 6), normal(g, t, 600, 9), 0.25, weighting


def _wide(weighting: str, t: torch.dtype, g: torch.Generator) -> tuple:
    """Scores within a small part of one: every atom is chosen."""
    return unit(g, t, 14, 50), unit(g, t, 400, 50), normal(g, t, 400, 20), 1e-4, weighting


def _uniform(t: torch.dtype, g: torch.Generator) -> tuple:
    """Queries of zeros: all atoms share the weight, and the sum of the weights shows in the result."""
    return torch.zeros(2, 8, dtype=t), normal(g, t, 5000, 8), normal(g, t, 5000, 9, mean=1.0), 1.0, "sparsemax"


def _nan(t: torch.dtype, g: torch.Generator) -> tuple:
    """NaN in a query, in keys and in values: of the atom nearest to query 5, and of one that no query is near to."""
    queries, keys, values = normal(g, t, 20, 24), normal(g, t, 600, 24), normal(g, t, 600, 10)
    keys[17], keys[18] = 9 * queries[5], -9 * queries.sum(0)
    queries = poison_row(queries, 3)
    keys = poison_row(poison_row(keys, 7), 11, torch.inf)
    return queries, keys, poison_row(poison_row(values, 17), 18), 0.3, "sparsemax"


def _no_usable_atom(t: torch.dtype, g: torch.Generator) -> tuple:
    keys = poison_row(poison_row(normal(g, t, 2, 4), 0), 1, -torch.inf)
    return normal(g, t, 3, 4), keys, normal(g, t, 2, 5), 0.5, "sparsemax"


def _large_mean(t: torch.dtype, g: torch.Generator) -> tuple:
    return normal(g, t, 20, 40, mean=10.0), normal(g, t, 500, 40, mean=100.0), normal(g, t, 500, 7), 0.02, "sparsemax"


def _huge(t: torch.dtype, g: torch.Generator) -> tuple:
    """Scores up to 1e64: the largest wins alone."""
    keys = normal(g, t, 600, 24, scale=1e32)
    return normal(g, t, 20, 24, scale=1e32), keys, normal(g, t, 600, 10), 1.0, "sparsemax"


def _strided(t: torch.dtype, g: torch.Generator) -> tuple:
    queries, keys, values = strided(normal(g, t, 13, 40)), strided(normal(g, t, 170, 40)), strided(normal(g, t, 170, 9))
    return queries, keys, values, 40**-0.5, "entmax15"


def cases() -> list[Case]:
    made = [
        Case("small", _normal(6, 11, 8, 5, 0.4), (torch.float32, torch.bfloat16), gradient=True, compiled=True),
        Case("small_entmax15", _normal(6, 11, 8, 5, 0.4, "entmax15"), gradient=True),
        Case("one", _normal(1, 1, 1, 1, 1.0)),
        Case("one_atom", _normal(30, 1, 16, 3, 1.0, "entmax15")),
        Case("one_query", _normal(1, 700, 33, 17, 0.2)),
        Case("no_queries", _normal(0, 9, 8, 4, 1.0)),
        Case("across_tiles", _normal(130, 300, 65, 20, 65**-0.5)),
        Case("across_tiles_entmax15", _normal(14, 2100, 129, 150, 129**-0.5, "entmax15")),
        Case("large_mean", _large_mean),
        Case("strided", _strided),
        Case("huge", _huge, FLOAT32),
        Case("tiny", _normal(12, 150, 24, 10, 1e-30), FLOAT32),
        Case("nan", _nan),
        Case("uniform", _uniform, FLOAT32),
        Case("no_usable_atom", _no_usable_atom),
    ]
    for weighting in ("sparsemax", "entmax15"):
        made += [
            Case(f"ties_{weighting}", partial(_ties, weighting)),
            Case(f"every_atom_{weighting}", partial(_wide, weighting)),
        ]
    return made
