"""Segmented minima and the objective of CANN, against its formula in numpy: promises, random inputs, messages."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from planmill.kernels.neighbors import ImageIndex, find_neighbors, minimize_by_segment, score_images


def descriptors(rows: int, seed: int = 0, width: int = 128) -> torch.Tensor:
    """Like SIFT: not negative, of length 512, rounded."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)).abs()
    return (torch.nn.functional.normalize(x, dim=1) * 512).round()


def published(f: np.ndarray, x: np.ndarray, bounds: list[int], p0: float = 120.0, p1: float = 0.4591763556652752):
    """phi of the distance to the nearest feature of each image, averaged over the query's features; float64."""
    distance = np.sqrt(((f[:, None] - x[None]) ** 2).sum(2))
    nearest = np.stack([distance[:, a:b].min(1) for a, b in pairwise(bounds)], 1)
    power = p1 / (1 - p1)
    phi = np.where(nearest < p0, (1 - np.minimum(nearest / p0, 1) ** power) ** (1 / power), 0.0)
    return phi.mean(0)


def test_published_values_of_phi() -> None:
    """Four values that the specification of the published constants names."""
    x = torch.zeros(1, 3)
    for distance, phi in ((28.283, 0.665), (60.0, 0.385), (100.0, 0.102), (119.0, 0.0029)):
        got = float(score_images(torch.tensor([[0.0, distance, 0.0]]), x, torch.tensor([0, 1])))
        assert abs(got - phi) < 6e-4
    assert float(score_images(x, x, torch.tensor([0, 1]))) == 1.0
    assert float(score_images(x + 120, x, torch.tensor([0, 1]))) == 0.0


def test_equals_the_formula_and_finds_the_image() -> None:
    bounds = [0, 40, 41, 300, 620, 700]
    x = descriptors(700)
    noise = torch.randn(120, 128, generator=torch.Generator().manual_seed(3)) * 4
    queries = x[torch.arange(120) * 2 + 330] + noise  # of the fourth image
    index = ImageIndex(x, torch.tensor(bounds))
    want = published(queries.double().numpy(), x.double().numpy(), bounds)
    torch.testing.assert_close(index(queries).double(), torch.from_numpy(want), atol=2e-6, rtol=1e-5)
    scores, order = index.rank(queries, 5)
    assert order.tolist()[0] == 3
    assert torch.equal(scores, index(queries)[order.long()])
    assert "images=5, rows=700, width=128, reach=120.0" in repr(index)


def test_images_without_features_and_features_without_numbers() -> None:
    x = descriptors(30)
    queries = x[:4].clone()
    queries[1, 5] = torch.nan
    got = score_images(queries, x, torch.tensor([0, 0, 30, 30]))
    assert got.tolist() == [0.0, 0.75, 0.0]
    assert ImageIndex(x, torch.tensor([0, 0, 30, 30])).rank(queries, 3)[1].tolist() == [1, 0, 2]  # ties: lower first
    assert score_images(x[:0], x, torch.tensor([0, 10, 30])).tolist() == [0.0, 0.0]


def test_random_segments_give_the_bits_of_knn() -> None:
    g = torch.Generator().manual_seed(0)
    for seed in range(12):
        d, m = (1, 3, 17, 64)[seed % 4], (1, 50, 1030)[seed % 3]
        q, x = (torch.randn(rows, d, generator=g) * 10.0 ** (seed % 5 - 2) + (seed % 2) * 1e3 for rows in (33, m))
        bounds = [0, *sorted(torch.randint(m + 1, (3,), generator=g).tolist()), m]
        got = minimize_by_segment(q, x, torch.tensor(bounds))
        for s in range(4):
            want = find_neighbors(q, x[bounds[s] : bounds[s + 1]], 1)
            assert torch.equal(got[0][:, s], want[0][:, 0])
            assert torch.equal(got[1][:, s], torch.where(want[1][:, 0] < 0, -1, want[1][:, 0] + bounds[s]))


def test_exports_with_any_number_of_queries() -> None:
    index, auto = ImageIndex(descriptors(50), torch.tensor([0, 20, 50])), torch.export.Dim.AUTO
    program = torch.export.export(index, (descriptors(7, 1),), dynamic_shapes=({0: auto},))
    more = descriptors(12, 2)
    assert torch.equal(program.module()(more), index(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, o: score_images(x, x, o, reach=0), ValueError, "image_ranking: reach must be above 0 and finite"),
        (lambda x, o: score_images(x, x, o, exponent=1), ValueError, "image_ranking: exponent must be between 0 and 1"),
        (lambda x, o: score_images(x, x, o[:1]), ValueError, "segmented_min: offsets must go from 0 to 6 without"),
        (lambda x, o: score_images(x, x.half(), o), TypeError, "segmented_min: database must be torch.float32 like"),
        (lambda x, o: ImageIndex(x, o + 1), ValueError, "segmented_min: offsets must go from 0 to 6 without"),
        (lambda x, o: ImageIndex(x, o).rank(x, 3), ValueError, r"ImageIndex.rank: k must be from 1 to 2, got 3"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(descriptors(6, width=4), torch.tensor([0, 2, 6]))  # type: ignore[operator]
