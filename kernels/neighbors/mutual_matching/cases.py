"""Inputs of mutual_matching that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided, unit
from planmill.kernels.common.spec import Case
from planmill.kernels.neighbors.mutual_matching.reference import fuse

FLOAT32 = (torch.float32,)
DISTANCE = 2e-6  # of the rows' common length: what float32 may get wrong
ONE = (1.0, 1.0, 1.0)  # weights, no ratio test


def _alone(a: torch.Tensor, b: torch.Tensor, *scalars: float) -> tuple:
    """One feature."""
    return a, b, a[..., :0], b[..., :0], *(scalars or ONE)


def _signs(g: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows of +1 and -1: with a power of four channels every product is exact, and full of ties."""
    return 2 * integers(g, dtype, *shape, high=2) - 1


def _pair(g: torch.Generator, dtype: torch.dtype, *shape: int, noise: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """A map and a shuffled, noisy copy: most rows have one clear match."""
    a = torch.randn(*shape, generator=g)
    b = a[:, torch.randperm(shape[1], generator=g)] + noise * torch.randn(*shape, generator=g)
    return a.to(dtype), b.to(dtype)


def _zero_rows(x: torch.Tensor) -> torch.Tensor:
    x = x.clone()
    x[:, ::3] = 0
    return x


def _far(g: torch.Generator, dtype: torch.dtype) -> tuple:
    return _alone(normal(g, dtype, 1, 39, 24, mean=100.0), normal(g, dtype, 1, 150, 24, mean=100.0))


def _two(g: torch.Generator, dtype: torch.dtype, ratio: float) -> tuple:
    a, b = _pair(g, dtype, 2, 20, 24)
    a2, b2 = _pair(g, dtype, 2, 20, 9)
    return a, b, a2, _zero_rows(b2), 0.6, 1.1, ratio


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: _alone(normal(g, t, 2, 5, 8), normal(g, t, 2, 9, 8), 2.0, 1.0, 0.95),
             gradient=True, compiled=True),
        Case("one", lambda t, g: _alone(normal(g, t, 1, 1, 1), normal(g, t, 1, 1, 1), 1.0, 1.0, 0.8)),
        Case("odd", lambda t, g: _alone(*_pair(g, t, 1, 67, 33)), gradient=True),
        Case("two_features", lambda t, g: _two(g, t, 1.0), gradient=True),
        Case("two_features_ratio", lambda t, g: _two(g, t, 0.8)),
        Case("across_tiles", lambda t, g: _alone(unit(g, t, 1, 131, 33), unit(g, t, 1, 193, 33))),
        Case("across_tiles_ratio",
             lambda t, g: _alone(normal(g, t, 1, 98, 40), normal(g, t, 1, 130, 40), 1.0, 1.0, 0.9), FLOAT32),
        Case("no_rows", lambda t, g: _alone(normal(g, t, 2, 0, 8), normal(g, t, 2, 9, 8))),
        Case("no_columns", lambda t, g: _alone(normal(g, t, 2, 5, 8), normal(g, t, 2, 0, 8))),
        Case("ties", lambda t, g: _alone(_signs(g, t, 1, 40, 16), _signs(g, t, 1, 70, 16), 1.0, 1.0, 1.0)),
        Case("same_everywhere", lambda t, g: _alone(torch.ones(1, 20, 16, dtype=t), torch.ones(1, 30, 16, dtype=t))),
        Case("strided", lambda t, g: _alone(strided(normal(g, t, 2, 33, 40)), strided(normal(g, t, 2, 70, 40)))),
        Case("large_mean", lambda t, g: _far(g, t)),
        Case("huge", lambda t, g: _alone(normal(g, t, 1, 40, 64, scale=1e36), normal(g, t, 1, 150, 64, scale=1e36)),
             FLOAT32),
        Case("tiny", lambda t, g: _alone(normal(g, t, 1, 40, 64, scale=1e-32), normal(g, t, 1, 150, 64, scale=1e-36)),
             FLOAT32),
        Case("nan", lambda t, g: _alone(poison_row(normal(g, t, 1, 20, 64), 3), poison_row(normal(g, t, 1, 40, 64), 7),
                                        1.0, 1.0, 0.9)),
        Case("infinity",
             lambda t, g: _alone(normal(g, t, 2, 20, 24), poison_row(normal(g, t, 2, 50, 24), 7, torch.inf))),
        Case("nothing", lambda t, g: _alone(_zero_rows(normal(g, t, 1, 1, 8)), normal(g, t, 1, 9, 8), 1.0, 1.0, 0.9)),
    ]  # fmt: skip


def _first_twins(x: torch.Tensor) -> torch.Tensor:
    """For each row [N, D] the lowest row that is the same."""
    index = torch.arange(len(x))
    alone = torch.where(x.isfinite().all(1, keepdim=True), 0.0, 1.0 + index[:, None])  # no twin of what matches nothing
    _, group = torch.unique(torch.cat([x.double().nan_to_num(0, 0, 0), alone], 1), dim=0, return_inverse=True)
    return torch.full((len(x),), len(x)).scatter_reduce(0, group, index, "amin")[group]


def _check_nearest(distance: torch.Tensor, index: torch.Tensor, rows: torch.Tensor, tolerance: float) -> None:
    """Each row's index [n] reaches the least distance of its row [n, m], and the first of equal rows [m, D]."""
    usable = ~distance.isnan()
    assert index.dtype == torch.int32
    assert torch.equal(index >= 0, usable.any(1)), "another set of rows has a neighbour"
    some = index >= 0
    if bool(some.any()):
        least = distance.nan_to_num(torch.inf)[some].amin(1)
        chosen = index[some].long()
        reached = distance[some].gather(1, chosen[:, None])[:, 0]
        torch.testing.assert_close(reached, least, atol=tolerance, rtol=1e-5)
        assert torch.equal(_first_twins(rows)[chosen], chosen), "a tie went to a higher index"


def _clear(distance: torch.Tensor, index: torch.Tensor, ratio: float) -> torch.Tensor:
    """[n]: by how much the second nearest, times ratio, is farther than the nearest."""
    if distance.shape[1] == 0:
        return distance.new_zeros(len(distance))
    known = distance.nan_to_num(torch.inf)
    there = index.clamp_min(0).long()[:, None]
    return ratio * known.scatter(1, there, torch.inf).amin(1) - known.gather(1, there)[:, 0]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Neighbours as near as the nearest to float32, matches as the neighbours and the ratio say, scores close."""
    *features, weight, weight2, ratio = args
    size = (weight**2 + (weight2**2 if features[2].shape[-1] else 0.0)) ** 0.5
    tolerance = DISTANCE * size
    scores, nearest, back, indices = got
    assert scores.dtype == torch.float32
    assert indices.dtype == torch.int32
    torch.testing.assert_close(scores, want[0], atol=DISTANCE * size**2, rtol=0)
    a, b = (fuse(features[side], features[2 + side], weight, weight2) for side in (0, 1))
    given_a, given_b = (torch.cat([features[side], features[2 + side]], -1) for side in (0, 1))
    for entry in range(len(a)):
        distance = torch.cdist(a[entry], b[entry], compute_mode="donot_use_mm_for_euclid_dist")
        _check_nearest(distance, nearest[entry], given_b[entry], tolerance)
        _check_nearest(distance.mT, back[entry], given_a[entry], tolerance)
        own = torch.arange(len(a[entry]))
        there = nearest[entry].long().clamp_min(0)
        mutual = torch.zeros(len(own), dtype=torch.bool)
        margin = torch.zeros(len(own), dtype=torch.float64)
        if len(b[entry]):
            mutual = (nearest[entry] >= 0) & (back[entry].long()[there] == own)
            margin = torch.minimum(
                _clear(distance, nearest[entry], ratio), _clear(distance.mT, back[entry], ratio)[there]
            )
        matched = indices[entry] >= 0
        assert torch.equal(indices[entry][matched], nearest[entry][matched])
        if ratio == 1.0:
            assert torch.equal(matched, mutual)
            continue
        assert bool(mutual[matched].all()), "a match is not mutual"
        assert bool((margin[matched] >= -tolerance).all()), "a match fails the ratio test"
        assert bool((margin[mutual & ~matched] <= tolerance).all()), "a match is missing"
