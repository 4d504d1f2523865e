"""Code assignment and k-means against float64, scikit-learn (BSD-3) and definitions."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as SklearnKMeans

from planmill import kernels
from planmill.kernels.neighbors import (
    KMeans,
    KMeansResult,
    assign_codes,
    fit_kmeans,
    measure_codes,
    minimize_by_segment,
)
from planmill.kernels.neighbors.kmeans import _triton as in_rounds

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def score(x: torch.Tensor, e: torch.Tensor, metric: str) -> torch.Tensor:
    """[n, K] in float64, smaller is nearer."""
    a, b = x.double(), e.double()
    if metric == "l2":
        return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    if metric == "cosine":
        a, b = (torch.nn.functional.normalize(t, dim=1, eps=1e-300) for t in (a, b))
        return 1 - a @ b.T
    return -(a @ b.T)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_the_nearest(metric: str, dtype: torch.dtype) -> None:
    for n, k, d, scale, mean in ((1, 1, 1, 1, 0), (67, 33, 20, 1, 0), (130, 1030, 9, 30, 0), (300, 12, 64, 1, 20)):
        x, e = ((scale * normal(rows, d, seed=rows) + mean).to(dtype) for rows in (n, k))
        distances, codes = measure_codes(x, e, metric=metric)
        assert (distances.dtype, codes.dtype) == (torch.float32, torch.int32)
        true = score(x, e, metric)
        size = 1.0 if metric == "cosine" else float(true.abs().amax())
        reached = true.gather(1, codes[:, None].long())[:, 0]
        assert float((reached - true.amin(1)).max()) <= 2e-6 * size
        sign = -1 if metric == "dot" else 1
        torch.testing.assert_close(sign * distances.double(), reached, atol=2e-6 * size, rtol=0)


@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_ties_and_rows_without_a_match(metric: str) -> None:
    e = torch.cat([normal(9, 12, seed=1), normal(9, 12, seed=1)])
    x = 3 * normal(70, 12)
    x[4, 3], x[5, 0] = torch.nan, torch.inf
    distances, codes = measure_codes(x, e, metric=metric)
    assert codes[4] == codes[5] == -1
    assert bool(distances[4:6].isinf().all())
    others = torch.cat([codes[:4], codes[6:]])
    assert bool(((others >= 0) & (others < 9)).all())
    e[int(codes[0])] = torch.nan
    assert assign_codes(x, e, metric=metric)[0] == codes[0] + 9  # the copy
    assert assign_codes(x, e[:0], metric=metric).tolist() == [-1] * 70
    assert assign_codes(x[:0], e, metric=metric).shape == (0,)


def test_cosine_ignores_lengths_of_any_size() -> None:
    x, e = normal(60, 8), normal(40, 8, seed=1)
    for by in (1e-30, 1e-42, 1e30):
        lengths = by * (1 + torch.rand(40, 1))
        want = score(x, e * lengths, "cosine")
        codes = assign_codes(x, e * lengths, metric="cosine")
        near = want.gather(1, codes[:, None].long())[:, 0] - want.amin(1)
        assert float(near.max()) <= 1e-6
    assert measure_codes(torch.zeros(8), e, metric="cosine") == (1, 0)


def test_any_leading_shape_and_strides_give_the_bits_of_each_row_alone() -> None:
    x, e = normal(3, 5, 2 * 16)[..., ::2], normal(16, 40, seed=1).T
    distances, codes = measure_codes(x, e)
    assert distances.shape == codes.shape == (3, 5)
    for i in range(3):
        for j in range(5):
            own = measure_codes(x[i, j], e)
            assert torch.equal(own[0], distances[i, j])
            assert torch.equal(own[1], codes[i, j])


def test_distances_have_gradients() -> None:
    x, e = normal(6, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    for metric in ("l2", "cosine", "dot"):
        distances = measure_codes(x, e, metric=metric)[0]
        got = torch.autograd.grad(distances.square().sum(), (x, e))
        want = torch.autograd.grad(score(x, e, metric).amin(1).square().sum(), (x, e))
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def draw(seed: int) -> tuple[torch.Tensor, int]:
    g = torch.Generator().manual_seed(seed)
    n, d, clusters = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((30, 400), (1, 30), (1, 25)))
    return 5 * torch.randn(n, d, generator=g) + 4 * torch.randn(d, generator=g), clusters


@pytest.mark.parametrize("seed", range(12))
def test_lloyd_goes_the_way_of_scikit_learn(seed: int) -> None:
    x, clusters = draw(seed)
    start = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:clusters]]
    if seed % 3 == 0:
        start[-1] += 1000  # no row is near: the cluster is relocated
    want = SklearnKMeans(clusters, init=start.numpy(), n_init=1, algorithm="lloyd").fit(x.numpy())
    got = fit_kmeans(x, clusters, start=start)
    np.testing.assert_allclose(got.centers.numpy(), want.cluster_centers_, atol=1e-4 * float(x.abs().max()))
    np.testing.assert_array_equal(got.labels.numpy(), want.labels_)
    assert got.iterations == want.n_iter_
    assert got.inertia == pytest.approx(want.inertia_, rel=1e-5)


def data(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ties, copies, rows far from the origin or of any size, and starts that no row is near."""
    g = torch.Generator().manual_seed(seed)
    n, d, clusters = (int(torch.randint(low, high, (1,), generator=g)) for low, high in ((1, 400), (1, 70), (1, 160)))
    x, clusters = torch.randn(n, d, generator=g), min(n, clusters)
    if seed % 7 == 0:
        x = torch.randint(0, 3, (n, d), generator=g).float()
    elif seed % 7 == 1:
        x += 1000 * torch.randn(d, generator=g)
    elif seed % 7 == 2:
        x = x[torch.randint(0, max(n // 4, 1), (n,), generator=g)]
    elif seed % 7 == 3:
        x *= 10.0 ** (5 * seed % 70 - 37)
    elif seed % 7 == 4:
        x *= torch.exp(3 * torch.randn(n, 1, generator=g))
    else:
        x += 4 * torch.randn(9, d, generator=g)[torch.randint(9, (n,), generator=g)]
    start = x[torch.randperm(n, generator=g)[:clusters]].clone()
    if seed % 3 == 0:
        start[-1] += 1000
    return x, start


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_rows_left_out_change_nothing(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds, packed rows and partial sums against every row assigned in every round, bit for bit."""
    monkeypatch.setattr(in_rounds.segmented_min, "launch", minimize_by_segment)
    with kernels.cpu_capability(level):
        for seed in range(14):
            x, start = data(seed)
            args = (x, start, 1 + seed % 9, 1e-3 * (seed % 2), seed % 4 < 2)
            for got, want in zip(torch.ops.planmill.kmeans(*args), in_rounds.launch(*args), strict=True):
                assert torch.equal(got, want), f"seed {seed}"


def lloyd_keeping(x: np.ndarray, centers: np.ndarray, iterations: int) -> np.ndarray:
    """Lloyd's iteration in float64; an empty cluster stays where it was."""
    centers = centers.copy()
    for _ in range(iterations):
        labels = ((x[:, None] - centers[None]) ** 2).sum(2).argmin(1)
        for j in set(labels.tolist()):
            centers[j] = x[labels == j].mean(0)
    return centers


@pytest.mark.parametrize("scale", [2.0**80, 2.0**-80])
def test_units_do_not_matter(scale: float) -> None:
    x = normal(300, 6) + 4 * (torch.arange(300) % 3)[:, None]
    wanted, got = fit_kmeans(x, 5, seed=1), fit_kmeans(x * scale, 5, seed=1)
    assert torch.equal(got.labels, wanted.labels)
    assert torch.equal(got.centers, wanted.centers * scale)
    assert got.inertia == wanted.inertia * scale**2


def test_policies_for_empty_clusters() -> None:
    x = normal(200, 3)
    start = torch.cat([x[:4], 100 + normal(2, 3)])
    kept = fit_kmeans(x, 6, start=start, empty="keep", iterations=10, tolerance=0)
    want = lloyd_keeping(x.double().numpy(), start.double().numpy(), 10)
    np.testing.assert_allclose(kept.centers.numpy(), want, atol=1e-5)
    assert torch.equal(kept.centers[4:], start[4:])
    moved = fit_kmeans(x, 6, start=start, empty="relocate")
    assert sorted(set(moved.labels.tolist())) == list(range(6))
    assert moved.inertia < kept.inertia


def test_a_relocated_row_leaves_its_cluster() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [9.0], [30.0]])
    once = fit_kmeans(x, 3, start=torch.tensor([[1.0], [200.0], [300.0]]), iterations=1, tolerance=0)
    assert once.centers.tolist() == [[1.0], [30.0], [9.0]]  # the farthest row to the first empty cluster
    alone = fit_kmeans(x[:1], 1, start=torch.tensor([[5.0]]))
    assert alone.centers.tolist() == [[0.0]]
    copies = fit_kmeans(torch.ones(5, 2), 3)  # every row is a centre already
    assert copies.inertia == 0
    assert copies.labels.tolist() == [0] * 5
    taken = fit_kmeans(x[-2:], 2, start=torch.tensor([[0.0], [90.0]]), iterations=1)
    assert taken.centers.tolist() == [[9.0], [30.0]]


def test_starts_are_rows_reproducible_and_k_means_plus_plus_spreads() -> None:
    blobs = 1000 * normal(20, 5, seed=1)
    x = blobs.repeat_interleave(15, 0) + normal(300, 5)
    for seed in range(3):
        found = fit_kmeans(x, 20, seed=seed)
        assert len(set(found.labels.tolist())) == 20
        assert found.inertia < 2 * x.numel()  # one centre in each blob, whatever the seed
        again = fit_kmeans(x, 20, seed=seed)
        assert torch.equal(found.centers, again.centers)
    one_round = [fit_kmeans(x, 7, start="random", seed=seed, iterations=1) for seed in (0, 1)]
    assert not torch.equal(one_round[0].centers, one_round[1].centers)
    assert fit_kmeans(x, 300, start="random").inertia == 0  # distinct rows


def test_distant_data_and_half_precision() -> None:
    x = normal(400, 6)
    x[:200] += 4
    near, far = (fit_kmeans(data, 2, seed=3) for data in (x, x + 4096))
    torch.testing.assert_close(far.centers - 4096, near.centers, atol=2e-3, rtol=0)
    assert torch.equal(near.labels, far.labels)
    for dtype in DTYPES[1:]:
        half = fit_kmeans(x.to(dtype), 2, seed=3)
        assert half.centers.dtype == torch.float32
        assert torch.equal(half.centers, fit_kmeans(x.to(dtype).float(), 2, seed=3).centers)


def test_the_layer_assigns_as_the_fit_did() -> None:
    x = normal(6, 50, 8)
    found = fit_kmeans(x.flatten(0, 1), 9)
    layer = KMeans.fit(x.flatten(0, 1), 9)
    assert torch.equal(layer(x).flatten(), found.labels)
    other = KMeans(torch.zeros(9, 8))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), layer(x))
    assert isinstance(found, KMeansResult)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: assign_codes(x, x[:, :3]), r"features must be \[..., D\] and codes \[K, D\]"),
        (lambda x: assign_codes(x, x, metric="l1"), "metric must be"),
        (lambda x: assign_codes(x[0, 0], x), r"features must be \[..., D\], got \[\]"),
        (lambda x: fit_kmeans(x, 0), "clusters must be from 1 to the number of rows 6, got 0"),
        (lambda x: fit_kmeans(x[:, :0], 2), r"features must be \[n, D\] with D at least 1, got \[6, 0\]"),
        (lambda x: fit_kmeans(x, 7), "clusters must be from 1 to the number of rows 6, got 7"),
        (lambda x: fit_kmeans(x, 2, start=x[:3]), r"start must be \[2, 4\], got \[3, 4\]"),
        (lambda x: fit_kmeans(x, 2, start=torch.full((2, 4), torch.inf)), "start holds NaN or infinity"),
        (lambda x: fit_kmeans(x, 2, start="first"), "start must be"),
        (lambda x: fit_kmeans(x, 2, empty="split"), "empty must be"),
        (lambda x: fit_kmeans(x, 2, iterations=0), "needs iterations of at least 1"),
        (lambda x: fit_kmeans(x, 2, tolerance=-1.0), "a tolerance from 0"),
        (lambda x: fit_kmeans(x.index_fill(0, torch.tensor(3), torch.nan), 2), "NaN or infinity in row 3"),
        (lambda x: KMeans(x[0]), r"centers must be \[K, D\]"),
    ],
)
def test_errors(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(6, 4))
    with pytest.raises(TypeError, match=r"codes must be torch.float32 like features"):
        assign_codes(normal(6, 4), normal(6, 4).half())
    for metric in ("l2", "cosine", "dot"):
        with pytest.raises(TypeError, match=r"code_assignment: features must be float32, bfloat16 or float16, got"):
            assign_codes(normal(6, 4).double(), normal(6, 4).double(), metric=metric)
    with pytest.raises(TypeError):
        fit_kmeans(torch.ones(6, 4, dtype=torch.int64), 2)
