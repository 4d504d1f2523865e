"""Constrained search against plain formulas and scikit-learn (BSD-3): promises, the index, random inputs, messages."""

from typing import Any

import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from planmill.kernels.neighbors import GridIndex, find_constrained_neighbors, find_neighbors


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def places(n: int, axes: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, axes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_hand(
    q: torch.Tensor, x: torch.Tensor, allowed: torch.Tensor, k: int, metric: str = "l2"
) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs in float64, those that are not allowed at infinity, a stable sort."""
    if metric == "dot":
        distance = -(q.double() @ x.double().T)
    else:
        square = (q.double()[:, None] - x.double()[None]).square().sum(2)
        distance = square if metric == "l2sq" else square.sqrt()
    values, order = torch.where(allowed, distance, torch.inf).sort(dim=1, stable=True)
    order = torch.where(values == torch.inf, -1, order)[:, :k]
    return -values[:, :k] if metric == "dot" else values[:, :k], order


def close(got: tuple[torch.Tensor, torch.Tensor], want: tuple[torch.Tensor, torch.Tensor]) -> None:
    torch.testing.assert_close(got[0].double(), want[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(got[1].long(), want[1])


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize("with_segments", [False, True], ids=["radius", "radius_and_segment"])
def test_equals_the_plain_formula(axes: int, with_segments: bool) -> None:
    q, x, own, others = normal(60, 20), normal(900, 20, seed=1), places(60, axes, 2), places(900, axes, 3)
    radius = {1: 0.02, 2: 0.1, 3: 0.25}[axes]
    allowed = (own[:, None] - others[None]).square().sum(2) <= radius**2
    segments: dict[str, Any] = {}
    if with_segments:
        segments = {"query_segments": torch.arange(60) % 4, "segments": torch.arange(900).int() * 7 % 3}
        allowed &= segments["query_segments"][:, None] == segments["segments"][None]
    got = find_constrained_neighbors(q, x, 40, query_positions=own, positions=others, radius=radius, **segments)
    close(got, by_hand(q, x, allowed, 40))
    assert bool((got[1] < 0).any())
    assert bool((got[1] >= 0).any())


def test_same_neighbours_as_scikit_learn_within_a_radius() -> None:
    q, x, own, others = normal(40, 12), normal(700, 12, seed=1), places(40, 2, 2), places(700, 2, 3)
    near = NearestNeighbors(radius=0.15).fit(others.numpy()).radius_neighbors(own.numpy(), return_distance=False)
    got = find_constrained_neighbors(q, x, 1, query_positions=own, positions=others, radius=0.15)[1][:, 0]
    for i, rows in enumerate(near):
        order = torch.from_numpy(rows).long()
        assert int(got[i]) == int(order[(q[i] - x[order]).norm(dim=1).argmin()])


@pytest.mark.usefixtures("two_threads")
def test_long_segments_give_the_bits_of_knn() -> None:
    """They are answered through its screen; a segment that few queries ask for is walked over directly."""
    q, x = normal(100, 96), normal(3000, 96, seed=1)
    own, theirs = torch.arange(100) // 90, torch.arange(3000) % 3
    got = find_constrained_neighbors(q, x, 5, query_segments=own, segments=theirs)
    for segment in (0, 1):
        asked, rows = (own == segment).nonzero()[:, 0], (theirs == segment).nonzero()[:, 0]
        want = find_neighbors(q[asked], x[rows], 5)
        assert torch.equal(got[0][asked], want[0])
        assert torch.equal(got[1][asked].long(), rows[want[1].long()])


def test_the_index_gives_the_bits_of_the_function() -> None:
    q, x, own, others = normal(70, 33), normal(2000, 33, seed=1), places(70, 2, 2), places(2000, 2, 3)
    mine, theirs = torch.arange(70) % 2, torch.arange(2000) % 2
    index = GridIndex(x, positions=others, segments=theirs, radius=0.2)
    for radius in (0.2, 0.07):
        want = find_constrained_neighbors(
            q, x, 4, query_positions=own, positions=others, radius=radius, query_segments=mine, segments=theirs
        )
        got = index(q, 4, positions=own, segments=mine, radius=radius)
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    alone = index(q[5:6], 4, positions=own[5:6], segments=mine[5:6])
    whole = index(q, 4, positions=own, segments=mine)
    assert torch.equal(alone[0], whole[0][5:6])
    assert torch.equal(alone[1], whole[1][5:6])
    assert "rows=2000, width=33, axes=2, radius=0.2" in repr(index)


def test_an_index_in_half_precision_keeps_its_positions() -> None:
    x, others = normal(300, 16), places(300, 2) + 4e6  # float32 would move these by half a unit
    index = GridIndex(x, positions=others, radius=0.3).bfloat16()
    got = index(x[:9].bfloat16(), 1, positions=others[:9])
    assert torch.equal(got[1][:, 0], torch.arange(9, dtype=torch.int32))
    assert index.positions.dtype == torch.float64


@pytest.mark.usefixtures("two_threads")
def test_pairs_that_are_screened_give_the_bits_of_pairs_that_are_compared() -> None:
    """Queries that share their cells and are near most of their rows are screened together; one alone is not."""
    q, x, own, others = normal(70, 64), normal(2500, 64, seed=1), places(70, 2, 2), places(2500, 2, 3)
    x[7, 3], q[5, 1] = torch.nan, torch.inf
    for metric in ("l2", "cosine", "dot"):
        index = GridIndex(x, positions=others, radius=0.8, metric=metric)
        whole = index(q, 6, positions=own)
        for i in range(0, 70, 5):
            alone = index(q[i : i + 1], 6, positions=own[i : i + 1])
            assert torch.equal(alone[0], whole[0][i : i + 1])
            assert torch.equal(alone[1], whole[1][i : i + 1])
    assert int((whole[1][5] >= 0).sum()) == 0


def test_a_row_too_long_for_the_screen_is_still_found() -> None:
    x, own = normal(3000, 16), places(3000, 2)
    x[3] = 1e25
    index = GridIndex(x, positions=own, radius=2)
    values, found = index(torch.cat([normal(40, 16, seed=1), x[3:4] * 0.9]), 2, positions=own[:41])
    assert found[40, 0] == 3
    torch.testing.assert_close(values[40, 0].double(), (x[3].double() * 0.1).norm(), rtol=1e-5, atol=0)


def test_rows_at_exactly_the_radius_match_however_the_cells_fall() -> None:
    """Integer positions, where every distance is exact: 5 = |(3, 4)| away is within, the next grid point is not."""
    y, x = torch.meshgrid(torch.arange(40), torch.arange(40), indexing="ij")
    grid = torch.stack([y.flatten(), x.flatten()], 1) - 17
    features = normal(1600, 4)
    got = find_constrained_neighbors(features, features, 90, query_positions=grid, positions=grid, radius=5)
    count = ((grid[:, None] - grid[None]).square().sum(2) <= 25).sum(1)
    assert torch.equal((got[1] >= 0).sum(1), count)
    equal = find_constrained_neighbors(features, features, 2, query_positions=grid, positions=grid, radius=0)
    assert torch.equal(equal[1], torch.stack([torch.arange(1600), torch.full((1600,), -1)], 1).int())


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e12], ids=str)
@pytest.mark.parametrize("far", [0.0, 1e7, -3e15], ids=str)
def test_any_unit_and_any_origin(scale: float, far: float) -> None:
    """Cells are never finer than the positions' rounding, however far the origin is from them."""
    q, x = normal(50, 6), normal(800, 6, seed=1)
    own, others = (places(50, 2, 2) + far) * scale, (places(800, 2, 3) + far) * scale
    for radius in (0.0, 1e-7 * scale, 0.1 * scale, 3 * scale):
        allowed = (own[:, None] - others[None]).square().sum(2) <= radius**2
        got = find_constrained_neighbors(q, x, 4, query_positions=own, positions=others, radius=radius)
        close(got, by_hand(q, x, allowed, 4))


def test_positions_and_segments_that_match_nothing() -> None:
    q, x, own, others = normal(6, 5), normal(40, 5, seed=1), places(6, 2), places(40, 2, 1)
    own[0, 0], others[3, 1], others[4], others[5, 0] = torch.nan, torch.nan, torch.inf, -torch.inf
    allowed = (own[:, None] - others[None]).square().sum(2) <= 4
    got = find_constrained_neighbors(q, x, 40, query_positions=own, positions=others, radius=2)
    close(got, by_hand(q, x, allowed, 40))
    assert bool((got[1][0] == -1).all())
    unknown = find_constrained_neighbors(q, x, 1, query_segments=torch.full((6,), 9), segments=torch.arange(40) % 9)
    assert bool((unknown[1] == -1).all())


def test_gradient_reaches_the_rows_found() -> None:
    q, x, own, others = normal(9, 7), normal(50, 7, seed=1), places(9, 2), places(50, 2, 1)
    a, b = q.clone().requires_grad_(), x.clone().requires_grad_()
    values, found = find_constrained_neighbors(a, b, 2, query_positions=own, positions=others, radius=0.9)
    values.sum().backward()
    c, d = q.double().requires_grad_(), x.double().requires_grad_()
    (c[:, None] - d[found.long()]).norm(dim=2).sum().backward()
    assert a.grad is not None
    assert b.grad is not None
    torch.testing.assert_close(a.grad.double(), c.grad, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(b.grad.double(), d.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("two_threads")
def test_random_inputs() -> None:
    g = torch.Generator().manual_seed(0)

    def pick(*options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=g))]

    for seed in range(60):
        n, m, d, axes, k = pick(1, 5, 40), pick(1, 30, 700), pick(1, 8, 33), pick(0, 1, 2, 3), pick(1, 3, 64)
        q, x = (torch.randn(rows, d, generator=g).mul(3).round() for rows in (n, m))  # full of ties
        own, others = (torch.randn(rows, axes, generator=g, dtype=torch.float64) for rows in (n, m))
        if pick(True, False):
            own, others = own.round(), others.round()
        radius = pick(0.0, 0.1, 1.0, 30.0)
        allowed = (own[:, None] - others[None]).square().sum(2) <= radius**2
        given: dict[str, Any] = {"query_positions": own, "positions": others, "radius": radius} if axes else {}
        if axes == 0 or pick(True, False):
            names = torch.tensor([-7, 0, 3, 2**40])
            mine, theirs = (names[torch.randint(4, (rows,), generator=g)] for rows in (n, m))
            allowed &= mine[:, None] == theirs[None]
            given |= {"query_segments": mine, "segments": theirs}
        print(f"seed {seed}: {n} {m} {d} {axes} {k} {radius}")  # shown by pytest where the comparison fails
        metric = pick("l2sq", "dot")
        got = find_constrained_neighbors(q, x, k, metric, **given)
        want = by_hand(q, x, allowed, k, metric)
        found = want[0].shape[1]
        torch.testing.assert_close(got[0][:, :found].double(), want[0], atol=0, rtol=1e-6)
        assert torch.equal(got[1][:, :found].long(), want[1])
        assert bool((got[1][:, found:] == -1).all())


class Search(torch.nn.Module):
    """An index in a model."""

    def __init__(self) -> None:
        super().__init__()
        self.index = GridIndex(normal(90, 8), positions=places(90, 2), segments=torch.arange(90) % 2, radius=0.4)

    def forward(self, x: torch.Tensor, positions: torch.Tensor, segments: torch.Tensor) -> torch.Tensor:
        return self.index(x, 3, positions=positions, segments=segments)[0]


def test_compiles_and_exports_with_any_number_of_queries() -> None:
    model, auto = Search(), torch.export.Dim.AUTO
    args = (normal(7, 8, seed=1), places(7, 2, 1), torch.arange(7) % 2)
    program = torch.export.export(model, args, dynamic_shapes=({0: auto}, {0: auto}, {0: auto}))
    more = (normal(12, 8, seed=2), places(12, 2, 2), torch.arange(12) % 2)
    assert torch.equal(program.module()(*more), model(*more))
    torch.compiler.reset()
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(*args), model(*args))


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "give positions and radius, segments, or both; find_neighbors searches without them"),
        ({"positions": places(6, 2)}, ValueError, "positions and radius belong together, got only positions"),
        ({"radius": 1.0}, ValueError, "give positions and radius"),
        ({"segments": torch.arange(6), "radius": 1.0}, ValueError, "belong together, got only radius"),
        ({"positions": places(6, 2), "radius": 1.0}, ValueError, "query_positions must be given where positions are"),
        ({"segments": torch.arange(6)}, ValueError, "query_segments must be given where segments are"),
        ({"positions": places(5, 2), "radius": 1.0}, ValueError, r"positions must be \[6, p\] with p from 1 to 3"),
        ({"positions": places(6, 4), "radius": 1.0}, ValueError, r"p from 1 to 3, got \[6, 4\]"),
        ({"positions": places(6, 2), "radius": -1.0}, ValueError, r"radius must be from 0 to 1e\+150, got -1.0"),
        ({"positions": places(6, 2), "radius": torch.inf}, ValueError, "radius must be from 0"),
        ({"positions": places(6, 2) > 0, "radius": 1.0}, TypeError, "positions must be floating point, int32 or int64"),
        ({"segments": places(6, 1)[:, 0]}, TypeError, "segments must be int32 or int64"),
        ({"segments": torch.arange(5)}, ValueError, r"segments must be \[6\], got \[5\]"),
        (
            {"positions": places(6, 2), "radius": 1.0, "query_positions": places(6, 3)},
            ValueError,
            "query_positions must have 2 axes like positions, got 3",
        ),
        ({"segments": torch.arange(6), "query_segments": torch.arange(6), "k": 0}, ValueError, "k must be from 1 to"),
        (
            {"segments": torch.arange(6), "query_segments": torch.arange(6), "metric": "euclid"},
            ValueError,
            "metric must be one of l2",
        ),
    ],
)
def test_messages(given: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"constrained_search: .*{message}"):
        find_constrained_neighbors(normal(6, 4), normal(6, 4), **{"k": 1, **given})


def test_an_index_says_what_it_cannot_do() -> None:
    index = GridIndex(normal(6, 4), positions=places(6, 2), radius=0.5)
    with pytest.raises(ValueError, match=r"radius must be at most the index's, 0.5, got 0.6"):
        index(normal(2, 4), positions=places(2, 2), radius=0.6)
    with pytest.raises(ValueError, match=r"database must be \[m, 5\] like queries"):
        index(normal(2, 5), positions=places(2, 2))
    with pytest.raises(TypeError, match="database must be"):
        index(normal(2, 4).half(), positions=places(2, 2))
