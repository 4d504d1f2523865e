"""knn and segmented_max against FAISS (MIT), scikit-learn (BSD-3) and plain formulas; promises and messages."""

import faiss
import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from planmill.kernels.neighbors import find_neighbors, maximize_by_segment


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("n", "m", "d", "k"), [(100, 3000, 96, 9), (3, 5000, 64, 5), (40, 700, 33, 64)])
def test_same_neighbours_as_faiss(n: int, m: int, d: int, k: int) -> None:
    q, x = normal(n, d), normal(m, d, seed=1)
    index = faiss.IndexFlatL2(d)
    index.add(x.numpy())
    want, rows = index.search(q.numpy(), k)
    got, found = find_neighbors(q, x, k, "l2sq")
    torch.testing.assert_close(got, torch.from_numpy(want), atol=1e-3, rtol=1e-5)
    assert (found.numpy() == rows).mean() > 0.999  # FAISS's own Gram form may swap near ties


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_same_neighbours_as_scikit_learn(metric: str) -> None:
    q, x = normal(80, 40), normal(2000, 40, seed=1)
    oracle = NearestNeighbors(n_neighbors=7, algorithm="brute", metric={"l2": "euclidean"}.get(metric, metric))
    want, rows = oracle.fit(x.double().numpy()).kneighbors(q.double().numpy())
    got, found = find_neighbors(q, x, 7, metric)
    torch.testing.assert_close(got.double(), torch.from_numpy(want), atol=1e-5, rtol=1e-5)
    assert (found.numpy() == rows).all()


def test_dot_is_descending() -> None:
    q, x = normal(50, 64), normal(900, 64, seed=1)
    got, found = find_neighbors(q, x, 6, "dot")
    want, rows = (q.double() @ x.double().T).topk(6)
    torch.testing.assert_close(got.double(), want, atol=1e-4, rtol=1e-5)
    assert torch.equal(found.long(), rows)


def test_ties_go_to_the_lower_index_in_any_block() -> None:
    row = normal(1, 48)
    x = row.repeat(9000, 1)
    _, found = find_neighbors(normal(20, 48, seed=1), x, 30)
    assert torch.equal(found, torch.arange(30, dtype=torch.int32).repeat(20, 1))


def test_near_neighbours_far_from_the_origin() -> None:
    """The Gram form loses these: distances near 1e-2 at a distance of 3e5 from the origin."""
    x = (normal(2000, 64) * 1e-2).double() + 4e4
    x32 = x.float()
    got, _ = find_neighbors(x32[:100], x32, 3)
    want = torch.cdist(x32[:100].double(), x32.double(), compute_mode="donot_use_mm_for_euclid_dist").topk(
        3, largest=False
    )
    torch.testing.assert_close(got.double(), want.values, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("metric", ["dot", "cosine"])
@pytest.mark.parametrize("offset", [1.0, 1e4, 1e6])
def test_products_that_round_alike_are_those_of_float32(metric: str, offset: float) -> None:
    """Few queries meet every row, many are screened around the mean of the rows, where products differ more."""
    generator = torch.Generator().manual_seed(int(offset))
    for width in (7, 40, 200):
        rows = torch.randn(900, width, generator=generator) + offset * torch.randn(width, generator=generator)
        queries = torch.randn(20, width, generator=generator)
        many = find_neighbors(queries, rows, 6, metric)
        few = [find_neighbors(query[None], rows, 6, metric) for query in queries]
        for got, want in zip(many, zip(*few, strict=True), strict=True):
            assert torch.equal(got, torch.cat(want))
        best = maximize_by_segment(queries, rows, torch.tensor([0, 900]))[1]
        assert metric == "cosine" or torch.equal(best[:, 0], many[1][:, 0])


def test_a_row_too_long_for_the_sample_is_still_found() -> None:
    """The scale comes from a sample of rows; one enormous row outside it must not spoil the bounds."""
    x, q = normal(5000, 32), normal(40, 32, seed=1)
    x[3] = 1e25
    q[7] = 9e24
    got, found = find_neighbors(q, x, 2)
    want = torch.cdist(q.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist").topk(2, largest=False)
    assert found[7, 0] == 3
    torch.testing.assert_close(got.double(), want.values, rtol=1e-5, atol=0)


def test_many_queries_cross_a_group() -> None:
    q, x = normal(9000, 512), normal(300, 512, seed=1)
    got, found = find_neighbors(q, x, 1)
    want = torch.cdist(q, x).min(1)
    assert (found[:, 0] == want.indices).float().mean() > 0.999
    torch.testing.assert_close(got[:, 0], want.values, atol=1e-3, rtol=1e-4)


def test_a_query_does_not_depend_on_its_batch() -> None:
    q, x = normal(64, 72), normal(4000, 72, seed=1)
    whole = find_neighbors(q, x, 5)
    single = find_neighbors(q[10:11], x, 5)
    assert torch.equal(whole[0][10:11], single[0])
    assert torch.equal(whole[1][10:11], single[1])


def test_segments_equal_the_plain_formula() -> None:
    q, x = normal(70, 96), normal(3100, 96, seed=1)
    offsets = torch.tensor([0, 100, 100, 2500, 3100])
    values, indices = maximize_by_segment(q, x, offsets)
    s = q.double() @ x.double().T
    for k, (a, b) in enumerate([(0, 100), (100, 100), (100, 2500), (2500, 3100)]):
        if a == b:
            assert bool((values[:, k] == -torch.inf).all())
            assert bool((indices[:, k] == -1).all())
            continue
        best = s[:, a:b].max(1)
        torch.testing.assert_close(values[:, k].double(), best.values, atol=1e-4, rtol=1e-6)
        assert torch.equal(indices[:, k].long(), best.indices + a)


def test_gradients_of_an_empty_database_are_zero() -> None:
    q, x = normal(3, 4).requires_grad_(), normal(0, 4).requires_grad_()
    find_neighbors(q, x, 2)[0].nan_to_num(posinf=0).sum().backward()
    assert q.grad is not None
    assert not q.grad.any()
    maximize_by_segment(q, x, torch.tensor([0, 0]))[0].nan_to_num(neginf=0).sum().backward()
    assert not q.grad.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda q: find_neighbors(q, q, 0), ValueError, "knn: k must be from 1 to 1024, got 0"),
        (lambda q: find_neighbors(q, q, 1025), ValueError, "k must be from 1 to 1024, got 1025"),
        (lambda q: find_neighbors(q, q, 1, "euclid"), ValueError, "metric must be one of l2, l2sq, cosine, dot"),
        (lambda q: find_neighbors(q, q[:, :2], 1), ValueError, r"database must be \[m, 4\] like queries, got \[6, 2\]"),
        (lambda q: find_neighbors(q[0], q, 1), ValueError, r"queries must be \[n, D\], got \[4\]"),
        (
            lambda q: find_neighbors(q[:, :0], q[:, :0], 1),
            ValueError,
            r"queries must be \[n, D\] with D at least 1",
        ),
        (lambda q: maximize_by_segment(q[:, :0], q[:, :0], torch.tensor([0, 6])), ValueError, r"least 1, got \[6, 0\]"),
        (lambda q: find_neighbors(q, q.half(), 1), TypeError, "database must be torch.float32 like queries"),
        (lambda q: find_neighbors(q.int(), q.int(), 1), TypeError, "queries must be float32, bfloat16 or float16"),
        (lambda q: find_neighbors(q, q[:3], 1, exclude_self=True), ValueError, "as many queries as rows, got 6 and 3"),
        (lambda q: maximize_by_segment(q, q, torch.tensor([0, 4])), ValueError, "offsets must go from 0 to 6"),
        (lambda q: maximize_by_segment(q, q, torch.tensor([0, 4, 3, 6])), ValueError, "without decreasing"),
        (lambda q: maximize_by_segment(q, q, torch.tensor([0.0, 6.0])), TypeError, "offsets must be int32 or int64"),
        (lambda q: maximize_by_segment(q, q, torch.tensor([], dtype=torch.int32)), ValueError, "at least one entry"),
    ],
)
def test_messages(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(6, 4))  # type: ignore[operator]
