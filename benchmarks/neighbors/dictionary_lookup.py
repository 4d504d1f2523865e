"""lookup_dictionary against the sort-based formula and against entmax's projections.

Error: the largest difference from float64, over random queries, relative to the largest of their results.
Dictionaries as in DictAS (normal tokens of a few images, generated to a length of sqrt(D)): "clustered" around 64
centres, "gaussian" without structure; and "diffuse", unit rows, whose scores lie so close that 85 atoms share the
weight.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import lookup_dictionary

from ..cases import Case, Draw, Goal, Peer, plain

QUERIES_CHECKED = 64


def gaussian(n: int, m: int, d: int) -> Callable[[Draw], tuple]:
    """Gaussian values."""
    return lambda draw: (draw.normal(n, d), draw.normal(m, d), draw.normal(m, d))


def clustered(n: int, m: int, d: int, length: float | None = None) -> Callable[[Draw], tuple]:
    """Rows around 64 centres, of length sqrt(D) or `length`."""

    def make(draw: Draw) -> tuple:
        centers, size = draw.centers(64, d), d**0.5 if length is None else length
        return *(draw.clusters(rows, d, centers=centers) * size for rows in (n, m)), draw.normal(m, d)

    return make


def entmax15(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Ours, with the softer weights."""
    return lookup_dictionary(queries, keys, values, weighting="entmax15")


def sorted_formula(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """Scores, a sort of every row, the threshold, the weights, a dense product."""
    z = queries @ keys.T * queries.shape[1] ** -0.5
    z = z - z.amax(1, keepdim=True)
    ordered = z.sort(1, descending=True).values
    sums = ordered.cumsum(1)
    rank = torch.arange(1, z.shape[1] + 1, dtype=z.dtype, device=z.device)
    k = (1 + rank * ordered > sums).sum(1, keepdim=True)
    return (z - (sums.gather(1, k - 1) - 1) / k).clamp_min(0) @ values


def entmax(name: str) -> Callable[..., Callable[[], Any]]:
    """A projection of the package entmax between two products."""

    def prepare(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], Any]:
        import entmax as package

        project = getattr(package, name)
        return lambda: project(queries @ keys.T * queries.shape[1] ** -0.5, dim=1) @ values

    return prepare


def check(weighting: str) -> Callable[[tuple, torch.Tensor], float]:
    """Random queries against the reference."""

    def error(args: tuple, found: torch.Tensor) -> float:
        from planmill.kernels.neighbors.dictionary_lookup.reference import dictionary_lookup_reference

        queries, keys, values = args
        rows = torch.randperm(len(queries))[:QUERIES_CHECKED].to(queries.device)
        want = dictionary_lookup_reference(
            queries[rows].double(), keys.double(), values.double(), queries.shape[1] ** -0.5, weighting
        )
        return float((found[rows].double() - want).abs().max() / want.abs().max())

    return error


def flops(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> float:
    """One inner product per query and atom; the values of the few atoms that are chosen are not counted."""
    return 2.0 * len(queries) * len(keys) * queries.shape[1]


SORTED = "sort-based PyTorch formula"
SPARSEMAX = {
    SORTED: Peer(plain(sorted_formula), tolerance=1e-4),
    "entmax.sparsemax": Peer(entmax("sparsemax"), package="entmax", tolerance=1e-4),
}
ENTMAX15 = {"entmax.entmax15": Peer(entmax("entmax15"), package="entmax", tolerance=1e-4)}
SIZE, SMALL = (1369, 5476, 768), (100, 1200, 64)
SHARED: dict[str, Any] = {"op": "dictionary_lookup", "flops": flops, "tolerance": {torch.float32: 1e-5}}

CASES = [
    *(
        Case(
            id=f"n1369-m5476-D768-{name}",
            make=make(*SIZE, **options),
            small=make(*SMALL, **options),
            ours=lookup_dictionary,
            peers=SPARSEMAX,
            check=check("sparsemax"),
            goals=(Goal("ratio", 2, SORTED),),
            memory=True,
            **SHARED,
        )
        for name, make, options in (
            ("clustered", clustered, {}),
            ("gaussian", gaussian, {}),
            ("diffuse", clustered, {"length": 1.0}),
        )
    ),
    Case(
        id="n1369-m5476-D768-entmax15",
        make=clustered(*SIZE),
        small=clustered(*SMALL),
        ours=entmax15,
        peers=ENTMAX15,
        check=check("entmax15"),
        **SHARED,
    ),
]
