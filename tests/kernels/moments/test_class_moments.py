"""average_by_class against scikit-learn and a loop over classes, and its errors."""

import numpy as np
import pytest
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from planmill.kernels.moments import average_by_class, covariance_moments


def test_it_equals_scikit_learn(generator: torch.Generator) -> None:
    """Oracle: scikit-learn (BSD-3); its pooled covariance weighs each class by its share."""
    labels = torch.randint(0, 6, (900,), generator=generator)
    x = torch.randn(900, 12, generator=generator) + 5 * torch.randn(6, 12, generator=generator)[labels]
    result = average_by_class(x, labels, 6)
    lda = LinearDiscriminantAnalysis(solver="lsqr", store_covariance=True).fit(x.double().numpy(), labels.numpy())
    np.testing.assert_allclose(result.means.numpy(), lda.means_, atol=1e-6, rtol=1e-6)
    np.testing.assert_allclose(result.scatter.numpy() / 900, lda.covariance_, atol=1e-6)
    np.testing.assert_allclose(result.counts.numpy() / 900, lda.priors_)


def test_distant_classes_cost_no_accuracy(generator: torch.Generator) -> None:
    labels = torch.randint(0, 9, (2000,), generator=generator)
    x = torch.randn(2000, 30, generator=generator) + 1000 * torch.randn(9, 30, generator=generator)[labels]
    scatter = average_by_class(x, labels, 9).scatter.double()
    truth = torch.zeros(30, 30, dtype=torch.float64)
    for c in range(9):
        truth += torch.cov(x[labels == c].double().T, correction=0) * int((labels == c).sum())
    deviation = truth.diagonal().sqrt()
    assert float(((scatter - truth) / (deviation[:, None] * deviation)).abs().max()) < 1e-6


def test_one_class_is_the_covariance(generator: torch.Generator) -> None:
    x = torch.randn(700, 40, generator=generator) + 3
    result = average_by_class(x, torch.zeros(700, dtype=torch.int64), 1)
    whole = covariance_moments(x)
    torch.testing.assert_close(result.scatter / 699, whole.covariance, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(result.means[0], whole.mean, atol=1e-6, rtol=1e-6)


def test_a_hundred_thousand_classes(generator: torch.Generator) -> None:
    labels = torch.randperm(100_000, generator=generator)[:3000]
    x = torch.randn(3000, 8, generator=generator)
    result = average_by_class(x, labels, 100_000)
    assert torch.equal(result.means[labels], x)
    assert int(result.counts.sum()) == 3000
    assert not bool(result.scatter.any())  # every row is its class's mean


def test_random_labels() -> None:
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        n, d, classes = (int(torch.randint(1, high, (), generator=g)) for high in (1500, 60, 40))
        x = torch.randn(n, d, generator=g) * 3 + 10
        labels = torch.randint(-1, classes, (n,), generator=g)
        result = average_by_class(x, labels, classes)
        for c in range(classes):
            rows = x[labels == c].double()
            assert int(result.counts[c]) == len(rows)
            want = rows.mean(0) if len(rows) else torch.zeros(d, dtype=torch.float64)
            torch.testing.assert_close(result.means[c].double(), want, atol=1e-5, rtol=1e-6)


def test_errors() -> None:
    x, labels = torch.randn(4, 3), torch.tensor([0, 1, 5, 0])
    with pytest.raises(ValueError, match="labels must be from -1 to 1, got 5 in row 2"):
        average_by_class(x, labels, 2)
    with pytest.raises(ValueError, match=r"labels must be \[4\] like features, got \[3\]"):
        average_by_class(x, labels[:3], 6)
    with pytest.raises(TypeError, match=r"labels must be int64 or int32, got torch\.float32"):
        average_by_class(x, labels.float(), 6)
    with pytest.raises(ValueError, match="classes must be at least 1, got 0"):
        average_by_class(x, labels, 0)
    with pytest.raises(ValueError, match=r"features must be \[N, d\], got \[4\]"):
        average_by_class(x[:, 0], labels, 6)
