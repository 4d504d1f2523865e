"""Retrieval against scikit-learn's neighbours (BSD-3), formulas in float64, and its own file."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.neighbors import KNeighborsClassifier

from planmill.kernels.neighbors import Retriever, retrieve_values, vote_by_class


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def labelled(seed: int, rows: int = 90, width: int = 12, classes: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    y = torch.arange(rows) % classes
    return normal(classes, width, seed=99)[y] + normal(rows, width, seed=seed), y


def softmax_of(temperature: float) -> Callable[[np.ndarray], np.ndarray]:
    return lambda distances: np.exp((1 - distances) / temperature)


@pytest.mark.parametrize("k", [1, 6, 90])
@pytest.mark.parametrize(
    ("weights", "theirs"),
    [("plain", "uniform"), ("similarity", lambda d: np.maximum(1 - d, 0)), ("softmax", softmax_of(0.2))],
    ids=["plain", "similarity", "softmax"],
)
def test_shares_are_those_of_scikit_learn(k: int, weights: str, theirs: str | Callable) -> None:
    (x, y), (held_x, _) = labelled(0), labelled(1, rows=150)
    retriever = Retriever(x, y, k=k, weights=weights, temperature=0.2)
    want = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=theirs).fit(x.double().numpy(), y)
    shares = retriever(held_x)
    np.testing.assert_allclose(shares.numpy(), want.predict_proba(held_x.double().numpy()), atol=1e-5)
    np.testing.assert_array_equal(retriever.classify(held_x).numpy(), shares.numpy().argmax(1))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_retrieved_rows_are_the_nearest(metric: str, dtype: torch.dtype) -> None:
    x, y = labelled(0)
    x, q = x.to(dtype), normal(3, 11, 12, seed=5).to(dtype)
    found = Retriever(x, y, k=4, metric=metric).retrieve(q)
    assert found.rows.shape == found.labels.shape == (3, 11, 4)
    assert (found.rows.dtype, found.labels.dtype, found.similarities.dtype) == (torch.int32, torch.int32, torch.float32)
    assert torch.equal(found.labels.long(), y[found.rows.long()])
    a, b = q.double().flatten(0, 1), x.double()
    unit = [torch.nn.functional.normalize(t, dim=1) for t in (a, b)]
    want = (unit[0] @ unit[1].T if metric == "cosine" else -torch.cdist(a, b)).topk(4).values
    torch.testing.assert_close(found.similarities.double().flatten(0, 1), want, atol=2e-6, rtol=2e-6)
    assert Retriever(x, y, k=4, metric=metric).retrieve(q[0, 0], 2).rows.tolist() == found.rows[0, 0, :2].tolist()


def test_what_matches_nothing_has_no_votes() -> None:
    x, y = labelled(0)
    x[3, 2] = torch.nan
    retriever = Retriever(x, y, classes=9, k=90, weights="softmax")
    q = normal(4, 12)
    q[1, 0] = torch.inf
    shares = retriever(q)
    assert shares.shape == (4, 9)
    assert shares[1].tolist() == [0] * 9
    assert retriever.classify(q)[1] == -1
    torch.testing.assert_close(shares.sum(1)[[0, 2, 3]], torch.ones(3))
    assert retriever.retrieve(q).rows[0].tolist().count(-1) == 1  # the row that holds NaN is never retrieved
    opposite = Retriever(q[:1], y[:1], weights="similarity")
    assert opposite.classify(-q[:1]).tolist() == [-1]
    assert retriever(q[:0]).shape == (0, 9)
    assert torch.equal(retriever(q[2]), shares[2])  # alone as in a batch


def test_votes_of_any_size_and_sharp_temperatures() -> None:
    s = torch.tensor([[3e4, 2.9e4, -1e4], [-1e30, -2e30, -torch.inf], [torch.nan, 1.0, 1.0]])
    labels = torch.tensor([[2, 0, 1], [1, 1, 0], [0, 1, -1]])
    for temperature in (1e-3, 1.0):
        shares = vote_by_class(s, labels, 3, weights="softmax", temperature=temperature)
        assert shares.tolist() == [[0, 0, 1], [0, 1, 0], [0, 1, 0]]
    plain = vote_by_class(s, labels, 3)
    torch.testing.assert_close(plain, torch.tensor([[1, 1, 1], [0, 3, 0], [0, 3, 0]]) / 3)
    even = torch.ones(1, 4)
    assert vote_by_class(even, torch.tensor([[3, 1, 1, 3]]), 4).argmax(1).tolist() == [1]  # a tie: the lower class


def test_values_of_the_nearest_key() -> None:
    keys, features = normal(20, 6), normal(4, 9, 6, seed=1)
    nearest = torch.cdist(features.double(), keys.double()).argmin(-1)
    for values in (torch.rand(20), torch.rand(20, 3), torch.rand(20).double()):
        assert torch.equal(retrieve_values(features, keys, values), values[nearest])
    features[1, 2, 3] = torch.nan
    found = retrieve_values(features, keys, torch.rand(20))
    assert found.isnan().nonzero().tolist() == [[1, 2]]
    assert bool(retrieve_values(features, keys[:0], torch.rand(0)).isnan().all())
    values = torch.rand(20, 3, requires_grad=True)
    found = retrieve_values(features[0], keys, values)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert torch.equal(gradient[:, 0], torch.bincount(nearest[0], minlength=20).float())


def test_a_saved_retriever_is_the_same_and_knows_its_extractor(tmp_path: Path) -> None:
    x, y = labelled(0)
    path = tmp_path / "a.retriever"
    settings = {"classes": 8, "k": 5, "weights": "softmax", "temperature": 0.07, "extractor": "dinov2.s"}
    retriever = Retriever(x.half(), y, **settings)
    retriever.save(path)
    loaded = Retriever.load(path, extractor="dinov2.s")
    q = normal(30, 12).half()
    assert torch.equal(loaded(q), retriever(q))
    assert {name: getattr(loaded, name) for name in settings} == settings
    assert len(loaded) == 90
    with pytest.raises(ValueError, match=r"holds features of 'dinov2\.s', not of 'dinov2\.b'"):
        Retriever.load(path, extractor="dinov2.b")


def test_another_or_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.retriever"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match="is no saved Retriever"):
        Retriever.load(path)
    with pytest.raises(FileNotFoundError):
        Retriever.load(tmp_path / "none")
    save_file({"features": normal(4, 3)}, str(path))
    with pytest.raises(ValueError, match="is no saved Retriever"):
        Retriever.load(path)
    metadata = {"format": "planmill.retriever/1", "settings": json.dumps({"classes": 2})}
    save_file({"features": normal(4, 3), "labels": torch.arange(4)}, str(path), metadata=metadata)
    with pytest.raises(ValueError, match="is damaged: Retriever: labels must be from 0 to 1, got 0 to 3"):
        Retriever.load(path)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: Retriever(x, y[:2]), r"labels \[M\], got \[5, 4\] and \[2\]"),
        (lambda x, y: Retriever(x[:0], y[:0]), "M and D at least 1"),
        (lambda x, y: Retriever(x, y - 1), "labels must be from 0 to 3, got -1 to 3"),
        (lambda x, y: Retriever(x, y, classes=3), "labels must be from 0 to 2, got 0 to 4"),
        (lambda x, y: Retriever(x, y, metric="dot"), "metric must be"),
        (lambda x, y: Retriever(x, y, weights="rank"), "weights must be"),
        (lambda x, y: Retriever(x, y, weights="similarity", metric="l2"), 'need metric "cosine"'),
        (lambda x, y: Retriever(x, y, k=0), "needs k from 1 to 1024"),
        (lambda x, y: Retriever(x, y, temperature=0.0), "a temperature above 0"),
        (lambda x, y: Retriever(x, y)(x[:, :3]), r"features must be \[..., 4\]"),
        (lambda x, y: vote_by_class(x, y, 2), r"must both be \[..., k\]"),
        (lambda x, y: vote_by_class(x[:, 0], y, 0), "classes of at least 1"),
        (lambda x, y: vote_by_class(x[:, 0], y, 5, weights="rank"), "weights must be"),
        (lambda x, y: vote_by_class(x[:, 0], y, 4), r"labels must be from -1 to 3, got \[0, 1, 2, 3, 4\]"),
        (lambda x, y: retrieve_values(x, x, x[:2]), r"values \[K\] or \[K, V\]"),
    ],
)
def test_errors(call: Callable, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(normal(5, 4), torch.arange(5))


def test_errors_of_dtype() -> None:
    x, y = normal(5, 4), torch.arange(5)
    for call in (
        lambda: Retriever(x, y.float()),
        lambda: Retriever(y[:, None], y),
        lambda: Retriever(x, y)(x.half()),
        lambda: vote_by_class(x[:, 0], y.float(), 5),
        lambda: retrieve_values(x, x, y),
    ):
        with pytest.raises(TypeError):
            call()
