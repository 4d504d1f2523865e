"""Re-ranking, intermediaries, consistency, thresholds, clusters against their published formulas in numpy, float64."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.neighbors import (
    ConsistencyDetector,
    IntermediaryMatcher,
    ReciprocalRanker,
    average_intermediaries,
    mask_similar,
    match_intermediaries,
    pick_densest,
    rerank_reciprocally,
    score_consistency,
    sweep_thresholds,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def people(rows: int, seed: int, width: int = 16, identities: int = 12) -> torch.Tensor:
    """Rows around shared centres, so that sets of reciprocal neighbours grow."""
    centers = normal(identities, width, seed=99)
    return centers[torch.arange(rows) % identities] + 0.5 * normal(rows, width, seed=seed)


def reranked(q: np.ndarray, g: np.ndarray, k1: int, k2: int, weight: float) -> np.ndarray:
    """The published algorithm with dense matrices and sets."""
    f = np.vstack([q, g])
    distance = ((f[:, None] - f[None]) ** 2).sum(2)
    distance = distance / distance.max(1, keepdims=True)
    rank = np.argsort(distance, 1, kind="stable")

    def near(i: int, k: int) -> set[int]:
        return {j for j in rank[i, : k + 1].tolist() if i in rank[j, : k + 1]}

    encoded = np.zeros_like(distance)
    for i in range(len(f)):
        start = near(i, k1)
        grown = set(start)
        for j in start:
            candidate = near(j, int(np.around(k1 / 2)))
            if len(candidate & start) > 2 / 3 * len(candidate):
                grown |= candidate
        members = sorted(grown)
        value = np.exp(-distance[i, members])
        encoded[i, members] = value / value.sum()
    if k2 > 1:
        encoded = np.stack([encoded[rank[i, :k2]].mean(0) for i in range(len(f))])
    shared = np.minimum(encoded[: len(q), None], encoded[None, len(q) :]).sum(2)
    return (1 - weight) * (1 - shared / (2 - shared)) + weight * distance[: len(q), len(q) :]


@pytest.mark.parametrize(
    ("n", "m", "k1", "k2", "weight"),
    [(9, 130, 20, 6, 0.3), (30, 61, 5, 1, 0.0), (1, 2, 1, 2, 0.5), (3, 4, 20, 6, 0.3), (7, 90, 3, 25, 1.0)],
)
def test_reranking_equals_the_published_algorithm(n: int, m: int, k1: int, k2: int, weight: float) -> None:
    q, g = people(n, 1), people(m, 2) + 100.0  # far from the origin once both are shifted
    q = q + 100.0
    got = rerank_reciprocally(q, g, k1=k1, k2=k2, weight=weight)
    want = reranked(q.double().numpy(), g.double().numpy(), k1, k2, weight)
    torch.testing.assert_close(got.double(), torch.from_numpy(want), atol=5e-6, rtol=1e-5)
    assert torch.equal(ReciprocalRanker(g, k1=k1, k2=k2, weight=weight)(q), got)


def test_reranking_in_many_pieces_and_any_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    from planmill.kernels.neighbors.reciprocal_ranking import ranking

    q, g = people(11, 3), people(80, 4)
    want = rerank_reciprocally(q, g)
    monkeypatch.setattr(ranking, "ROWS", 7)
    monkeypatch.setattr(ranking, "PRODUCTS", 50)
    torch.testing.assert_close(rerank_reciprocally(q * 1e25, g * 1e25), want, atol=1e-5, rtol=1e-5)


def test_reranking_of_equal_rows_and_of_none() -> None:
    row = normal(1, 8)
    got = rerank_reciprocally(row.repeat(3, 1), row.repeat(5, 1), k1=9)
    torch.testing.assert_close(got, torch.zeros(3, 5), atol=1e-6, rtol=0)
    assert rerank_reciprocally(row[:0], row).shape == (0, 1)
    assert rerank_reciprocally(row, row[:0]).shape == (1, 0)


def test_intermediaries_equal_the_sums_over_them() -> None:
    u_q, v_q, u_g, v_g = normal(5, 6), normal(5, 7, seed=1), normal(20, 6, seed=2), normal(20, 7, seed=3)
    got = IntermediaryMatcher(u_g, v_g, k=4, temperature=0.2)(u_q, v_q)
    unit = [F.normalize(x.double(), dim=1).numpy() for x in (u_q, v_q, u_g, v_g)]

    def routes(keys: np.ndarray, alone: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        similar = keys @ unit[2].T
        if alone:
            np.fill_diagonal(similar, -np.inf)
        chosen = np.argsort(-similar, 1, kind="stable")[:, :4]
        near = np.take_along_axis(similar, chosen, 1)
        share = np.exp(near / 0.2) / np.exp(near / 0.2).sum(1, keepdims=True)
        return chosen, share, np.maximum((share * near).sum(1), 0)

    (t_q, a_q, b_q), (t_g, a_g, b_g) = routes(unit[0], False), routes(unit[2], True)
    for q in range(5):
        for g in range(20):
            direct = unit[1][q] @ unit[3][g]
            first = sum(a * (unit[3][t] @ unit[3][g]) for a, t in zip(a_q[q], t_q[q], strict=True))
            second = sum(a * (unit[1][q] @ unit[3][t]) for a, t in zip(a_g[g], t_g[g], strict=True))
            want = (direct + b_q[q] * first + b_g[g] * second) / (1 + b_q[q] + b_g[g])
            assert abs(float(got[q, g]) - want) < 2e-6


def test_intermediaries_that_are_not_there() -> None:
    keys, values = normal(3, 4), normal(3, 5, seed=1)
    means, availability = average_intermediaries(keys, keys[:0], values[:0], 2)
    assert not means.any()
    assert not availability.any()
    alone = IntermediaryMatcher(keys[:1], values[:1], k=3)(keys, values)  # no row has another one
    means, availability = average_intermediaries(keys, keys[:1], values[:1], 3)
    none = torch.zeros(1, 5), torch.zeros(1)
    torch.testing.assert_close(alone, match_intermediaries(values, values[:1], (means, availability), none))
    for wanted, got in zip(
        *(average_intermediaries(keys, keys, values, k, temperature=torch.inf) for k in (3, 5)), strict=True
    ):
        assert wanted.any()
        assert torch.equal(wanted, got)  # slots without a row have no weight
    for row in (1, 0):
        bad_keys, bad_values = keys.clone(), values.clone()
        bad_keys[row, 2] = bad_values[row, 1] = torch.nan
        means, availability = average_intermediaries(bad_keys, bad_keys, bad_values, 3)
        assert not means[row].any()
        assert availability[row] == 0
        assert means.isfinite().all()


def test_consistency_equals_its_formula() -> None:
    g0, g_t, c_t = normal(4, 9), normal(4, 50, 9, seed=1), normal(4, 50, 10, seed=2)
    y = torch.tensor([3, 0, 9, 3])
    got = score_consistency(g0, g_t, c_t, y)
    for i in range(4):
        a, b, c = (x[i].double().numpy() for x in (g0, g_t, c_t))
        r = b @ a / (np.linalg.norm(b, axis=1) * np.linalg.norm(a))
        label = c[:, y[i]] / np.linalg.norm(c, axis=1)
        assert abs(float(got[i]) - np.sort(0.8 * label + 0.2 * r)[::-1][19]) < 1e-6
    detector = ConsistencyDetector().fit(torch.arange(100.0), 0.05)
    assert detector.detect(torch.tensor([4.9, 5.0, torch.nan])).tolist() == [True, False, True]
    assert int(detector.detect(torch.arange(100.0)).sum()) == 5
    assert torch.equal(detector(g0, g_t, c_t, y), got)


@pytest.mark.parametrize("entries", [1 << 22, 100], ids=["together", "in_pieces"])
def test_sweep_equals_masks_one_by_one(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from planmill.kernels.neighbors.similarity_threshold import threshold

    monkeypatch.setattr(threshold, "ENTRIES", entries)
    x = normal(60, 3)
    x[4], x[5, 1] = 0, torch.nan
    prompts = torch.tensor([0, 7, 4, 5, 59])
    thresholds = torch.tensor([0.5, -2.0, 0.9, 0.0, 2.0, 0.5])
    target = torch.arange(60) % 3 == 0
    sweep = sweep_thresholds(x, prompts, thresholds, target)
    unit = F.normalize(x.double(), dim=1)
    for a, t in enumerate(thresholds):
        masks = mask_similar(x, prompts, t.expand(5))
        assert torch.equal(masks, (unit[prompts] @ unit.T).float() > t)
        both, either = (masks & target).sum(1), (masks | target).sum(1)
        torch.testing.assert_close(sweep[:, a], both / either)
    assert not sweep_thresholds(x, prompts[:1], torch.tensor([2.0]), torch.zeros(60, dtype=torch.bool)).any()


def mvp(points: list, coverage: list, reach: float) -> int:
    """The published grouping, group by group."""
    groups: list[list[int]] = []
    used: set[int] = set()
    for i in range(len(points)):
        if i in used:
            continue
        group = [i]
        used.add(i)
        for j in range(len(points)):
            if j not in used and all(
                max(abs(points[k][0] - points[j][0]), abs(points[k][1] - points[j][1])) <= reach for k in group
            ):
                group.append(j)
                used.add(j)
        groups.append(group)
    groups.sort(key=len, reverse=True)
    best = max(groups, key=lambda g: len(g) + sum(coverage[k] for k in g) / len(g) / 1000)
    return max(best, key=lambda k: coverage[k])


def test_densest_cluster_equals_the_published_grouping() -> None:
    g = torch.Generator().manual_seed(0)
    for n in [1, 2, 3, 5, 11] * 20:
        points = torch.randint(0, 40, (n, 2), generator=g)
        coverage = torch.randint(0, 4, (n,), generator=g) / 4
        assert pick_densest(points, coverage) == mvp(points.tolist(), coverage.tolist(), 14)
    assert pick_densest(torch.empty(0, 2), torch.empty(0)) == -1
    assert pick_densest(torch.zeros(2, 2), torch.tensor([math.nan, 0.5])) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: rerank_reciprocally(x, x, k1=0), ValueError, "reciprocal_ranking: k1 must be from 1 to 1023"),
        (lambda x: rerank_reciprocally(x, x, weight=2), ValueError, "reciprocal_ranking: weight must be from 0 to 1"),
        (lambda x: rerank_reciprocally(x / 0, x), ValueError, "reciprocal_ranking: queries and gallery must be finite"),
        (lambda x: average_intermediaries(x, x, x[:2], 1), ValueError, "gallery_values must have 6 rows like gallery_"),
        (lambda x: average_intermediaries(x, x, x, 1, temperature=0), ValueError, "temperature must be above 0, got 0"),
        (
            lambda x: match_intermediaries(x, x, (x, x[0]), (x, x[:, 0])),
            ValueError,
            r"query_route must be \[6, 4\] and \[6\], got \[6, 4\] and \[4\]",
        ),
        (
            lambda x: score_consistency(x, x[None], x[:, None], torch.zeros(6, dtype=torch.int32)),
            ValueError,
            r"neighborhood_consistency: neighbors must be \[6, T, 4\] like features, got \[1, 6, 4\]",
        ),
        (
            lambda x: score_consistency(x, x[:, None], x[:, None], torch.full((6,), 4), k=1),
            ValueError,
            "labels must be from 0 to 3",
        ),
        (
            lambda x: score_consistency(x, x[:, None], x[:, None], torch.zeros(6, dtype=torch.int32)),
            ValueError,
            "k must be from 1 to the 1 neighbors, got 20",
        ),
        (lambda x: ConsistencyDetector().fit(x[0], 1.0), ValueError, "a share from 0 to below 1"),
        (lambda x: mask_similar(x, torch.tensor([6]), x[0, :1]), ValueError, "prompts must be from 0 to 5, got"),
        (lambda x: mask_similar(x, torch.tensor([5]), x[0]), ValueError, r"thresholds must be \[1\] like prompts"),
        (
            lambda x: sweep_thresholds(x, torch.tensor([5]), x[0] / 0, torch.ones(5, dtype=torch.bool)),
            ValueError,
            r"similarity_threshold: target must be \[6\], got \[5\]",
        ),
        (lambda x: pick_densest(x, x[0]), ValueError, r"densest_cluster: points must be \[n, 2\] and coverage \[n\]"),
        (lambda x: pick_densest(x[:, :2], x[:, 0], reach=-1), ValueError, "reach must be at least 0 pixels, got -1"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(6, 4))  # type: ignore[operator]
