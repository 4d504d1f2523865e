"""Closed-form heads: their formulas, fold(), scikit-learn and scipy, and few shots of real digits."""

import math

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn.datasets import load_digits
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.naive_bayes import GaussianNB
from torch.nn import functional as F

from planmill.kernels.moments import (
    CentroidHead,
    CosineHead,
    GaussianHead,
    LinearHead,
    NaiveBayesHead,
    VonMisesFisherHead,
    calibrate_prototypes,
    equiangular_vectors,
    simplex_vectors,
)


@pytest.fixture
def blobs(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """300 rows of 5 classes in 12 dimensions."""
    labels = torch.arange(300) % 5
    centers = 2 * torch.randn(5, 12, generator=generator)
    return torch.randn(300, 12, generator=generator) + centers[labels], labels


def heads(x: torch.Tensor, labels: torch.Tensor) -> list[LinearHead]:
    g = torch.Generator().manual_seed(1)
    text = F.normalize(torch.randn(5, x.shape[1], generator=g), dim=1)
    gaussian = GaussianHead.fit(x, labels)
    few = calibrate_prototypes(torch.randn(5, x.shape[1], generator=g), torch.randn(9, x.shape[1], generator=g))
    return [
        gaussian,
        GaussianHead.fit(x, labels, shrinkage=0.3, prior="frequency"),
        gaussian.with_zero_shot(text, alpha=0.1),
        NaiveBayesHead.fit(x, labels),
        CentroidHead.fit(x, labels),
        CosineHead.fit(x, labels),
        CosineHead(few),
        CosineHead(simplex_vectors(13)),
        VonMisesFisherHead.fit(x, labels),
    ]


def test_fold_gives_equal_logits(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = blobs
    for head in heads(x, labels):
        features = F.normalize(x, dim=1) if head.unit else x
        assert torch.equal(head.fold()(features), head(x)), type(head).__name__
        again = LinearHead(torch.zeros_like(head.weight), torch.zeros_like(head.bias), unit=head.unit)
        again.load_state_dict(head.state_dict())
        assert torch.equal(again(x), head(x))


def test_gaussian_is_the_discriminant(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """log N(x; mu_c, P^-1) less what all classes share, with the published precision."""
    x, labels = blobs
    mu = torch.stack([x[labels == c].double().mean(0) for c in range(5)])
    z = x.double() - mu[labels]
    s = z.T @ z / 299
    precision = 12 * torch.linalg.inv(299 * s + s.trace() * torch.eye(12, dtype=torch.float64))
    difference = x.double()[:, None] - mu
    log_density = -0.5 * torch.einsum("nci,ij,ncj->nc", difference, precision, difference) - math.log(5)
    logits = GaussianHead.fit(x, labels)(x).double()
    shared = 0.5 * torch.einsum("ni,ij,nj->n", x.double(), precision, x.double())
    torch.testing.assert_close(logits, log_density + shared[:, None], atol=1e-4, rtol=1e-4)


def test_gaussian_equals_scikit_learn(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Oracle: scikit-learn (BSD-3), which shrinks each class alike, so that the pooled covariance is shrunk alike."""
    x, labels = blobs
    for s in (0.0, 0.2, 1.0):
        head = GaussianHead.fit(x, labels, shrinkage=s, prior="frequency")
        lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=s).fit(x.double().numpy(), labels.numpy())
        np.testing.assert_allclose(head.weight.numpy(), lda.coef_, atol=1e-4, rtol=1e-4)
        np.testing.assert_allclose(head.bias.numpy(), lda.intercept_, atol=1e-3, rtol=1e-4)


def test_alpha_search(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = blobs
    head = GaussianHead.fit(x, labels)
    text = F.normalize(-head.weight, dim=1)  # a classifier that is always wrong: the largest alpha drowns it
    ensemble, alpha = head.search_alpha(text, x, labels, alphas=(1e-4, 1e6))
    assert alpha == 1e6
    assert torch.equal(ensemble(x).argmax(1), head(x).argmax(1))
    logits = 100 * x @ text.T + 1e6 * head(x)
    torch.testing.assert_close(ensemble(x), logits, atol=1e-2 * float(logits.abs().max()), rtol=1e-4)
    _, first = head.search_alpha(text * 0, x, labels)  # every alpha classifies alike
    assert first == 1e-4


def test_naive_bayes_is_the_quadratic_form(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = blobs
    mu = torch.stack([x[labels == c].double().mean(0) for c in range(5)])
    variance = ((x.double() - mu[labels]) ** 2).mean(0) + 1e-9 * float(x.double().var(0, correction=0).max())
    joint = -0.5 * ((x.double()[:, None] - mu) ** 2 / variance).sum(2) - math.log(5)
    logits = NaiveBayesHead.fit(x, labels)(x).double()
    torch.testing.assert_close(logits.log_softmax(1), joint.log_softmax(1), atol=1e-4, rtol=1e-4)


def test_nearest_centroid(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = blobs
    head = CentroidHead.fit(x, labels)
    squared = torch.cdist(x.double(), head.weight.double()) ** 2
    torch.testing.assert_close((x * x).sum(1)[:, None] - 2 * head(x), squared.float(), atol=1e-4, rtol=1e-4)


def test_calibration_is_the_published_formula(generator: torch.Generator) -> None:
    new, base = torch.randn(3, 8, generator=generator), torch.randn(6, 8, generator=generator)
    got = calibrate_prototypes(new, base, alpha=0.3)
    for q, result in zip(F.normalize(new, dim=1), got, strict=True):
        p = F.normalize(base, dim=1)
        w = torch.exp(16 * p @ q)
        delta = (w[:, None] * p).sum(0) / w.sum()
        torch.testing.assert_close(result, 0.7 * q + 0.3 * delta / delta.norm(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("d", [2, 3, 10, 64, 512])
def test_von_mises_fisher_equals_scipy(generator: torch.Generator, d: int) -> None:
    """Oracle: scipy (BSD-3), where its Bessel function stays in range."""
    directions = F.normalize(torch.randn(4, d, generator=generator).double(), dim=1)
    kappa = torch.tensor([0.5, 5.0, 40.0, 200.0], dtype=torch.float64)
    x = F.normalize(torch.randn(20, d, generator=generator).double(), dim=1)
    logits = VonMisesFisherHead(directions, kappa)(x.float()).double() + math.log(4)
    for c in range(4):
        truth = scipy.stats.vonmises_fisher(directions[c].numpy(), float(kappa[c])).logpdf(x.numpy())
        if np.isfinite(truth).all():
            np.testing.assert_allclose(logits[:, c].numpy(), truth, atol=2e-4, rtol=2e-6)


def test_von_mises_fisher_finds_the_concentration(generator: torch.Generator) -> None:
    mean = F.normalize(torch.randn(16, generator=generator), dim=0)
    rows = scipy.stats.vonmises_fisher(mean.double().numpy(), 60.0).rvs(4000, random_state=0)
    head = VonMisesFisherHead.fit(torch.from_numpy(rows).float(), torch.zeros(4000, dtype=torch.int64))
    assert abs(float(head.weight.norm()) - 60.0) < 1.5


def test_simplex() -> None:
    for classes in (2, 3, 10, 100):
        v = simplex_vectors(classes).double()
        wanted = torch.full((classes, classes), -1 / (classes - 1)).double().fill_diagonal_(1.0)
        torch.testing.assert_close(v @ v.T, wanted, atol=1e-6, rtol=0)


def test_equiangular() -> None:
    v, largest = equiangular_vectors(20, 24, threshold=0.05, steps=2000)
    gram = v @ v.T
    assert float((gram.abs() - torch.eye(20)).max()) <= 0.0502
    assert largest <= 0.0502
    torch.testing.assert_close(gram.diagonal(), torch.ones(20), atol=1e-5, rtol=0)


def few_shots(shots: int, seed: int) -> tuple[torch.Tensor, ...]:
    """`shots` digits of each class from the even rows of scikit-learn's digits; all odd rows."""
    data, target = load_digits(return_X_y=True)
    x, y = torch.tensor(data, dtype=torch.float32) / 16, torch.tensor(target)
    train = torch.arange(len(y)) % 2 == 0
    g = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(10):
        rows = (train & (y == c)).nonzero()[:, 0]
        chosen.append(rows[torch.randperm(len(rows), generator=g)[:shots]])
    rows = torch.cat(chosen)
    return x[rows], y[rows], x[~train], y[~train]


@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_few_shots_of_real_digits(shots: int) -> None:
    """At least scikit-learn's accuracy on the same rows, less half a point; five seeds. Oracle: scikit-learn (BSD-3).

    LinearDiscriminantAnalysis cannot be fitted on one shot: its covariance is 0.
    """
    accuracy: dict[str, list[float]] = {"gaussian": [], "lda": [], "bayes": [], "gaussian_nb": []}
    for seed in range(5):
        x, y, held_x, held_y = few_shots(shots, seed)
        rows, held = x.double().numpy(), held_x.double().numpy()
        for name, head in (("gaussian", GaussianHead.fit(x, y)), ("bayes", NaiveBayesHead.fit(x, y))):
            accuracy[name].append(float((head(held_x).argmax(1) == held_y).double().mean()))
        models = [("gaussian_nb", GaussianNB())]
        if shots > 1:
            models.append(("lda", LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto")))
        for name, model in models:
            accuracy[name].append(float((model.fit(rows, y.numpy()).predict(held) == held_y.numpy()).mean()))
    mean = {name: sum(values) / len(values) for name, values in accuracy.items() if values}
    assert mean["bayes"] >= mean["gaussian_nb"] - 0.005
    assert mean["gaussian"] >= mean.get("lda", 0.6) - 0.005


def test_errors(blobs: tuple[torch.Tensor, torch.Tensor]) -> None:
    x, labels = blobs
    with pytest.raises(ValueError, match="class 2 has no rows"):
        GaussianHead.fit(x[labels != 2], labels[labels != 2])
    with pytest.raises(ValueError, match="at least one row"):
        CentroidHead.fit(x[:0], labels[:0])
    with pytest.raises(torch.linalg.LinAlgError, match="singular; shrink it"):
        GaussianHead.fit(x[:8], torch.arange(8) % 2, shrinkage=0.0)
    with pytest.raises(ValueError, match=r"shrinkage must be from 0 to 1, got 1\.5"):
        GaussianHead.fit(x, labels, shrinkage=1.5)
    with pytest.raises(ValueError, match="prior must be uniform or frequency, got 'flat'"):
        GaussianHead.fit(x, labels, prior="flat")
    with pytest.raises(ValueError, match=r"text must be \[5, 12\], got \[4, 12\]"):
        GaussianHead.fit(x, labels).with_zero_shot(torch.zeros(4, 12), 1.0)
    with pytest.raises(ValueError, match="a channel has no variance"):
        NaiveBayesHead.fit(torch.ones(4, 2), torch.arange(4) % 2, smoothing=0.0)
    with pytest.raises(ValueError, match="all rows of class 1 have one direction"):
        VonMisesFisherHead.fit(torch.cat([x[:4], x[4:5], x[4:5]]), torch.tensor([0, 0, 0, 0, 1, 1]))
    with pytest.raises(ValueError, match="concentrations must be above 0"):
        VonMisesFisherHead(x[:2], torch.tensor([1.0, 0.0]))
    bad = x.clone()
    bad[7, 3] = torch.inf
    with pytest.raises(ValueError, match="NaN or infinity in row 7"):
        CosineHead.fit(bad, labels)
    with pytest.raises(ValueError, match="classes must be at least 2"):
        simplex_vectors(1)
    with pytest.raises(ValueError, match="prototypes must be"):
        calibrate_prototypes(x, x[:, :3])
    with pytest.raises(ValueError, match=r"weight must be \[K, d\] and bias \[K\]"):
        LinearHead(torch.zeros(3, 2), torch.zeros(2))
