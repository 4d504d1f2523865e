"""Inputs of constrained_search that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case
from planmill.kernels.neighbors.constrained_search.grid import build_grid, find_ranges
from planmill.kernels.neighbors.knn.cases import compare as compare_neighbors


def constrained(
    g: torch.Generator,
    queries: torch.Tensor,
    database: torch.Tensor,
    k: int,
    *,
    axes: int = 2,
    radius: float = 0.2,
    segments: int = 0,
    metric: str = "l2",
) -> tuple:
    """Arguments of the op: random positions in a unit cube, random segments."""
    n, m = len(queries), len(database)
    own, others = (torch.rand(rows, axes, generator=g, dtype=torch.float64) for rows in (n, m))
    seen, rows = (torch.randint(max(segments, 1), (count,), generator=g) for count in (n, m))
    grid = build_grid(others, rows if segments else None, radius if axes else 0.0)
    ranges = find_ranges(grid, own, seen if segments else None, radius if axes else 0.0)
    return queries, database, own, grid.positions, grid.rows, ranges, k, radius if axes else 0.0, metric


def cases() -> list[Case]:
    return [
        Case(
            "small", lambda t, g: constrained(g, normal(g, t, 6, 8), normal(g, t, 30, 8), 3, radius=0.4), compiled=True
        ),
        Case("one", lambda t, g: constrained(g, normal(g, t, 1, 1), normal(g, t, 1, 1), 1, radius=2.0)),
        Case("nothing_near", lambda t, g: constrained(g, normal(g, t, 5, 8), normal(g, t, 9, 8), 2, radius=1e-9)),
        Case("empty_database", lambda t, g: constrained(g, normal(g, t, 5, 8), normal(g, t, 0, 8), 2)),
        Case("no_queries", lambda t, g: constrained(g, normal(g, t, 0, 8), normal(g, t, 9, 8), 2)),
        Case("line", lambda t, g: constrained(g, unit(g, t, 17, 33), unit(g, t, 200, 33), 3, axes=1, radius=0.05)),
        Case("space", lambda t, g: constrained(g, unit(g, t, 9, 33), unit(g, t, 300, 33), 3, axes=3, radius=0.3)),
        Case("segments", lambda t, g: constrained(g, unit(g, t, 30, 40), unit(g, t, 300, 40), 2, axes=0, segments=7)),
        Case(
            "both",
            lambda t, g: constrained(g, unit(g, t, 20, 24), unit(g, t, 300, 24), 3, segments=3, metric="dot"),
        ),
        Case(
            "long_segment",  # on the CPU the screen of knn answers these
            lambda t, g: constrained(g, unit(g, t, 33, 129), unit(g, t, 300, 129), 1, axes=0, segments=1),
        ),
        Case(
            "many_neighbours",
            lambda t, g: constrained(g, unit(g, t, 2, 16), unit(g, t, 300, 16), 200, radius=0.7, metric="l2sq"),
        ),
        Case(
            "dense",  # nearly all pairs are within the radius: on the CPU they are screened
            lambda t, g: constrained(g, unit(g, t, 33, 257), unit(g, t, 270, 257), 2, radius=0.9, metric="cosine"),
        ),
        Case(
            "ties",
            lambda t, g: constrained(g, integers(g, t, 12, 5), integers(g, t, 500, 5), 7, metric="l2sq", radius=0.4),
        ),
        Case(
            "strided",
            lambda t, g: constrained(g, strided(unit(g, t, 33, 40)), strided(unit(g, t, 170, 40)), 5),
        ),
        Case(
            "large_mean",
            lambda t, g: constrained(g, normal(g, t, 20, 40, mean=1e3), normal(g, t, 100, 40, mean=1e3), 2, radius=0.5),
        ),
        Case(
            "huge",
            lambda t, g: constrained(g, normal(g, t, 9, 24, scale=1e30), normal(g, t, 200, 24, scale=1e30), 5),
            (torch.float32,),
        ),
        Case(
            "tiny_cosine",
            lambda t, g: constrained(
                g, normal(g, t, 9, 24, scale=1e-36), normal(g, t, 90, 24, scale=1e-40), 5, radius=0.6, metric="cosine"
            ),
            (torch.float32,),
        ),
        Case(
            "nan",
            lambda t, g: constrained(
                g, poison_row(unit(g, t, 6, 24), 3), poison_row(unit(g, t, 30, 24), 7), 30, radius=0.8, metric="dot"
            ),
        ),
        Case(
            "nan_cosine",
            lambda t, g: constrained(
                g,
                unit(g, t, 6, 24),
                poison_row(poison_row(unit(g, t, 30, 24), 7), 9, torch.inf),
                30,
                radius=2.0,
                metric="cosine",
            ),
        ),
        Case(
            "infinity",
            lambda t, g: constrained(
                g, unit(g, t, 4, 24), poison_row(unit(g, t, 30, 24), 7, torch.inf), 30, radius=2.0
            ),
        ),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """As neighbours are compared, and every neighbour lies where its query may look."""
    queries, database, own, positions, rows, ranges, k, radius, metric = args
    compare_neighbors((queries, database, k, metric, False, True), got, want, atol, rtol)
    slots = torch.empty(len(database), dtype=torch.long).scatter_(0, rows.long(), torch.arange(len(rows)))
    for i, row in enumerate(got[1].tolist()):
        for slot in slots[[j for j in row if j >= 0]].tolist():
            assert any(begin <= slot < end for begin, end in ranges[i].tolist()), "a row outside the ranges"
            assert float((own[i] - positions[slot]).norm()) <= radius * (1 + 1e-12), "a row outside the radius"
