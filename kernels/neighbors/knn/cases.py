"""Inputs of knn that tests, benchmarks and plan checks share."""

from functools import partial

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def _duplicates(dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    rows = unit(g, dtype, 40, 96)
    return torch.cat([rows, rows, rows])


def _same(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x, x


def _unit_case(metric: str, dtype: torch.dtype, g: torch.Generator) -> tuple:
    return unit(g, dtype, 37, 50), unit(g, dtype, 211, 50), 8, metric, False, True


def cases() -> list[Case]:
    made = [
        Case(
            "small",
            lambda t, g: (normal(g, t, 6, 8), normal(g, t, 11, 8), 3, "l2", False, True),
            gradient=True,
            compiled=True,
        ),
        Case("one", lambda t, g: (normal(g, t, 1, 1), normal(g, t, 1, 1), 1, "l2", False, True)),
        Case("padding", lambda t, g: (normal(g, t, 5, 8), normal(g, t, 3, 8), 7, "l2", False, True)),
        Case("empty_database", lambda t, g: (normal(g, t, 5, 8), normal(g, t, 0, 8), 2, "l2", False, True)),
        Case("no_queries", lambda t, g: (normal(g, t, 0, 8), normal(g, t, 9, 8), 2, "l2", False, True)),
        Case("across_tiles", lambda t, g: (unit(g, t, 130, 257), unit(g, t, 2100, 257), 9, "l2", False, True)),
        Case("many_neighbours", lambda t, g: (unit(g, t, 9, 32), unit(g, t, 2500, 32), 1024, "l2", False, True)),
        Case("ties", lambda t, g: (integers(g, t, 60, 6), integers(g, t, 900, 6), 17, "l2sq", False, True)),
        Case("duplicates", lambda t, g: (_duplicates(t, g)[:50], _duplicates(t, g), 5, "l2", False, True)),
        Case("exclude_self", lambda t, g: (*_same(unit(g, t, 90, 40)), 4, "l2", True, True)),
        Case("strided", lambda t, g: (strided(unit(g, t, 40, 40)), strided(unit(g, t, 170, 40)), 5, "l2", False, True)),
        Case(
            "large_mean",
            lambda t, g: (normal(g, t, 40, 40, mean=1000.0), normal(g, t, 200, 40, mean=1000.0), 5, "l2", False, True),
        ),
        Case(
            "huge",
            lambda t, g: (normal(g, t, 20, 24, scale=1e30), normal(g, t, 600, 24, scale=1e30), 5, "l2", False, True),
            FLOAT32,
        ),
        Case(
            "huge_cosine",
            lambda t, g: (
                normal(g, t, 20, 24, scale=3e36),
                normal(g, t, 600, 24, scale=3e37),
                5,
                "cosine",
                False,
                True,
            ),
            FLOAT32,
        ),
        Case(
            "tiny_cosine",
            lambda t, g: (
                normal(g, t, 20, 24, scale=1e-36),
                normal(g, t, 600, 24, scale=1e-40),
                5,
                "cosine",
                False,
                True,
            ),
            FLOAT32,
        ),
        Case(
            "tiny",
            lambda t, g: (normal(g, t, 20, 24, scale=1e-30), normal(g, t, 600, 24, scale=1e-30), 5, "l2", False, True),
            FLOAT32,
        ),
        Case(
            "nan",
            lambda t, g: (
                poison_row(unit(g, t, 20, 24), 3),
                poison_row(unit(g, t, 600, 24), 7),
                600,
                "l2",
                False,
                True,
            ),
        ),
        Case(
            "nan_cosine",
            lambda t, g: (poison_row(unit(g, t, 9, 8), 3), poison_row(unit(g, t, 40, 8), 7), 40, "cosine", False, True),
        ),
        Case(
            "infinity_cosine",
            lambda t, g: (unit(g, t, 20, 24), poison_row(unit(g, t, 600, 24), 7, torch.inf), 9, "cosine", False, True),
        ),
        Case(
            "zero_rows",
            lambda t, g: (
                unit(g, t, 14, 8) * (torch.arange(14) > 2)[:, None],
                unit(g, t, 3000, 8),
                4,
                "cosine",
                False,
                True,
            ),
        ),
        Case("screened", lambda t, g: (unit(g, t, 70, 128), unit(g, t, 500, 128), 6, "l2", False, False)),
    ]
    for metric in ("l2sq", "cosine", "dot"):
        make = partial(_unit_case, metric)
        made += [Case(metric, make, gradient=True)]
    return made


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Distances close relative to the vectors' lengths; each index reaches its distance; exact ties in index order."""
    queries, database, _, metric, _, exact = args
    atol = atol if exact else max(atol, 2e-3)  # near ties may have changed places
    distances, indices = got
    assert distances.dtype == torch.float32
    assert indices.dtype == torch.int32
    assert distances.shape == want[0].shape
    found = indices >= 0
    assert torch.equal(found, want[1] >= 0), "another number of neighbours"
    if not bool(found.any()):
        assert torch.equal(distances, want[0])
        return
    clean = database.double()[database.isfinite().all(1)]
    spread = float((clean - clean.mean(0)).norm(dim=1).amax()) or 1.0
    length = max(spread, float(queries.double()[queries.isfinite().all(1)].norm(dim=1).amax()))
    scale = {"l2": spread, "l2sq": spread**2, "cosine": 1.0, "dot": length * float(clean.norm(dim=1).amax())}[metric]
    torch.testing.assert_close(distances, want[0], atol=atol * min(scale, 3e38), rtol=rtol)
    q, x = queries.double(), database.double()
    rows = torch.arange(len(q))[:, None].expand_as(indices)[found]
    a, b = q[rows], x[indices[found].long()]
    if metric in ("l2", "l2sq"):
        reached = (a - b).norm(dim=1)
        reached = reached**2 if metric == "l2sq" else reached
    elif metric == "cosine":
        reached = 1 - torch.nn.functional.cosine_similarity(a, b, dim=1, eps=0).nan_to_num()
    else:
        reached = (a * b).sum(1)
    torch.testing.assert_close(reached.float(), distances[found], atol=atol * min(scale, 3e38), rtol=rtol)
    truth = torch.full(found.shape, torch.nan, dtype=torch.float64)
    truth[found] = reached
    tied = (truth[:, 1:] == truth[:, :-1]) & (distances[:, 1:] == distances[:, :-1])
    assert bool((indices[:, 1:] > indices[:, :-1])[tied].all()), "equal distances are not in index order"
    for row in indices.tolist():
        real = [i for i in row if i >= 0]
        assert len(set(real)) == len(real), "a row was returned twice"
