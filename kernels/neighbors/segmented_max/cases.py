"""Inputs of segmented_max that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case


def _offsets(*bounds: int) -> torch.Tensor:
    return torch.tensor(bounds, dtype=torch.int32)


def cases() -> list[Case]:
    return [
        Case(
            "small",
            lambda t, g: (normal(g, t, 5, 8), normal(g, t, 9, 8), _offsets(0, 4, 9)),
            gradient=True,
            compiled=True,
        ),
        Case("one", lambda t, g: (normal(g, t, 1, 1), normal(g, t, 1, 1), _offsets(0, 1))),
        Case("odd", lambda t, g: (unit(g, t, 67, 33), unit(g, t, 131, 33), _offsets(0, 1, 50, 131)), gradient=True),
        Case("across_tiles", lambda t, g: (unit(g, t, 130, 257), unit(g, t, 1300, 257), _offsets(0, 640, 1297, 1300))),
        Case("empty_segments", lambda t, g: (unit(g, t, 7, 16), unit(g, t, 20, 16), _offsets(0, 0, 5, 5, 20, 20))),
        Case("no_queries", lambda t, g: (unit(g, t, 0, 16), unit(g, t, 20, 16), _offsets(0, 5, 20))),
        Case("no_segments", lambda t, g: (unit(g, t, 4, 16), unit(g, t, 0, 16), _offsets(0))),
        Case("ties", lambda t, g: (integers(g, t, 40, 12), integers(g, t, 90, 12), _offsets(0, 30, 90))),
        Case("strided", lambda t, g: (strided(unit(g, t, 33, 40)), strided(unit(g, t, 70, 40)), _offsets(0, 33, 70))),
        Case("large_mean", lambda t, g: (normal(g, t, 19, 24), normal(g, t, 50, 24, mean=100.0), _offsets(0, 50))),
        Case(
            "huge",
            lambda t, g: (normal(g, t, 9, 24, scale=1e15), normal(g, t, 50, 24, scale=1e18), _offsets(0, 50)),
            (torch.float32,),
        ),
        Case(
            "tiny",
            lambda t, g: (normal(g, t, 9, 24, scale=1e-10), normal(g, t, 50, 24, scale=1e-12), _offsets(0, 50)),
            (torch.float32,),
        ),
        Case(
            "nan",
            lambda t, g: (poison_row(unit(g, t, 20, 24), 3), poison_row(unit(g, t, 50, 24), 7), _offsets(0, 7, 8, 50)),
        ),
        Case(
            "infinity",
            lambda t, g: (unit(g, t, 20, 24), poison_row(unit(g, t, 50, 24), 7, torch.inf), _offsets(0, 20, 50)),
        ),
    ]


def _lengths(rows: torch.Tensor) -> torch.Tensor:
    return rows.double()[rows.isfinite().all(1)].norm(dim=1)


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Values close relative to the vectors' lengths; each index reaches its value, and is the lowest one on ties."""
    queries, database, offsets = args
    values, indices = got
    assert values.dtype == torch.float32
    assert indices.dtype == torch.int32
    scale = 1.0
    if queries.numel() and database.numel():
        scale = float(_lengths(queries).amax() * _lengths(database).amax())
    torch.testing.assert_close(values, want[0], atol=atol * scale, rtol=0)
    found = indices >= 0
    assert torch.equal(found, want[1] >= 0), "another set of segments has a match"
    similarity = queries.double() @ database.double().T
    rows = torch.arange(len(queries))[:, None].expand_as(indices)[found]
    columns = indices[found].long()
    segment = torch.arange(indices.shape[1]).expand_as(indices)[found]
    assert bool((columns >= offsets[segment]).all())
    assert bool((columns < offsets[segment + 1]).all())
    reached = similarity[rows, columns]
    torch.testing.assert_close(reached, want[0][found].double(), atol=atol * scale, rtol=0)
    same = reached == similarity[rows, want[1][found].long()]
    assert bool((columns[same] <= want[1][found][same]).all()), "a tie went to a higher index"
