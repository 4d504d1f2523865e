"""Mahalanobis distances and detectors: scipy, scikit-learn, the published per-position form, errors."""

import numpy as np
import pytest
import scipy.spatial.distance
import scipy.stats
import torch
from sklearn.covariance import LedoitWolf, ShrunkCovariance
from sklearn.decomposition import PCA

from planmill.kernels.moments import (
    GaussianDetector,
    GaussianHead,
    Moments,
    PositionGaussians,
    VonMisesFisherHead,
    factor_covariance,
    measure_mahalanobis,
)


def spd(g: torch.Generator, d: int) -> torch.Tensor:
    a = torch.randn(d, 2 * d, generator=g, dtype=torch.float64)
    return a @ a.T / (2 * d)


def test_it_equals_scipy(generator: torch.Generator) -> None:
    """Oracle: scipy (BSD-3)."""
    covariance, mean = spd(generator, 17), torch.randn(17, generator=generator)
    x = torch.randn(40, 17, generator=generator)
    truth = scipy.spatial.distance.cdist(
        x.double().numpy(), mean.double().numpy()[None], "mahalanobis", VI=np.linalg.inv(covariance.numpy())
    )[:, 0]
    distances = measure_mahalanobis(x, mean, factor_covariance(covariance))
    np.testing.assert_allclose(distances.numpy(), truth, rtol=1e-5)


def test_per_position_equals_the_published_form(generator: torch.Generator) -> None:
    """Unbiased covariances + 0.01 I, explicit inverses, one einsum."""
    good = torch.randn(30, 12, 9, generator=generator) * 2 + 5
    new = torch.randn(4, 12, 9, generator=generator) * 3 + 5
    mean = good.double().mean(0)
    z = good.double() - mean
    covariance = torch.einsum("npc,npd->pcd", z, z) / 29 + 0.01 * torch.eye(9, dtype=torch.float64)
    delta = new.double() - mean
    truth = torch.einsum("bpc,pcd,bpd->bp", delta, torch.linalg.inv(covariance), delta).sqrt()
    exact = PositionGaussians.fit(good, dtype=torch.float32)(new)
    torch.testing.assert_close(exact.double(), truth, atol=0, rtol=1e-5)
    half = PositionGaussians.fit(good)(new)
    torch.testing.assert_close(half.double(), truth, atol=0, rtol=1e-2)
    assert PositionGaussians.fit(good).factor.element_size() * 45 == 90  # 45 of 81 numbers, two bytes each


def test_a_given_shrinkage(generator: torch.Generator) -> None:
    """Oracle: scikit-learn (BSD-3), whose covariances have the divisor N; PaDiM's have N - 1."""
    good = torch.randn(8, 3, 10, generator=generator) * 2 + 1
    new = torch.randn(5, 3, 10, generator=generator)
    model = ShrunkCovariance(shrinkage=0.2)
    one = GaussianDetector.fit(good[:, 0], shrinkage=0.2)(new[:, 0])
    of_places = PositionGaussians.fit(good, shrinkage=0.2, regularization=0.0, dtype=torch.float32)(new)
    for p in range(3):
        squares = model.fit(good[:, p].double().numpy()).mahalanobis(new[:, p].double().numpy())
        np.testing.assert_allclose(of_places[:, p].numpy(), np.sqrt(squares * 7 / 8), rtol=1e-4)
        if p == 0:
            np.testing.assert_allclose(one.numpy(), np.sqrt(squares), rtol=1e-4)
    for fit in (GaussianDetector.fit, PositionGaussians.fit):
        with pytest.raises(ValueError, match="shrinkage must be from 0 to 1"):
            fit(good[:, 0] if fit == GaussianDetector.fit else good, shrinkage=-0.1)


@pytest.mark.parametrize("d", [100, 550])
def test_what_is_read_is_at_most_55_percent_of_full_matrices(generator: torch.Generator, d: int) -> None:
    """Mean, triangle and one vector against mean, d x d float32 numbers and one vector; a quarter in bfloat16."""
    covariance = spd(generator, d)
    full = 4 * (2 * d + d * d)
    for dtype, share in ((torch.float32, 0.55), (torch.bfloat16, 0.275)):
        factor = factor_covariance(covariance, dtype)
        assert 4 * 2 * d + factor.nbytes <= share * full


def test_detector_is_ledoit_wolf(generator: torch.Generator) -> None:
    """Oracle: scikit-learn (BSD-3), whose distances are squared."""
    x = torch.randn(60, 20, generator=generator) @ torch.randn(20, 20, generator=generator) + 3
    new = torch.randn(10, 20, generator=generator) * 5
    model = LedoitWolf().fit(x.double().numpy())
    truth = np.sqrt(model.mahalanobis(new.double().numpy()))
    for fitted in (GaussianDetector.fit(x), GaussianDetector.fit(Moments(20).update(x[:31]).update(x[31:]))):
        np.testing.assert_allclose(fitted(new).numpy(), truth, rtol=1e-4)


@pytest.mark.parametrize("keep", ["pca", "npca"])
def test_principal_components(generator: torch.Generator, keep: str) -> None:
    x = torch.randn(200, 12, generator=generator) * torch.logspace(1, -2, 12) + 1
    new = torch.randn(9, 12, generator=generator) + 1
    detector = GaussianDetector.fit(x, keep=keep, explained=0.95)
    pca = PCA(svd_solver="full").fit(x.double().numpy())
    j = int(np.argmax(np.cumsum(pca.explained_variance_ratio_) > 0.95))
    axes = pca.components_[: j + 1] if keep == "pca" else pca.components_[j:]
    reduced = (x.double().numpy() - pca.mean_) @ axes.T
    truth = np.sqrt(LedoitWolf().fit(reduced).mahalanobis((new.double().numpy() - pca.mean_) @ axes.T))
    np.testing.assert_allclose(detector(new).numpy(), truth, rtol=1e-3)


def test_one_component_is_kept_where_one_explains_all(generator: torch.Generator) -> None:
    x = torch.zeros(50, 3)
    x[:, 0] = torch.randn(50, generator=generator)
    for keep in ("pca", "npca"):
        detector = GaussianDetector.fit(x + 1e-3 * torch.randn(50, 3, generator=generator), keep=keep, explained=0.5)
        assert len(detector.mean) == (1 if keep == "pca" else 3)


@pytest.mark.parametrize("sigma", [1.0, 3.0, 6.0])
def test_threshold_is_chi_square(generator: torch.Generator, sigma: float) -> None:
    detector = GaussianDetector.fit(torch.randn(300, 25, generator=generator))
    wanted = np.sqrt(scipy.stats.chi2.isf(scipy.special.erfc(sigma / np.sqrt(2)), 25))
    assert abs(detector.threshold(sigma) - wanted) < 1e-8 * wanted


def test_layers_compile_and_export(generator: torch.Generator) -> None:
    """In one piece, with a dynamic batch; heads and detectors alike."""
    good = torch.randn(40, 3, 6, generator=generator)
    labels = torch.arange(40) % 4
    layers: list[tuple[torch.nn.Module, torch.Tensor]] = [
        (GaussianDetector.fit(good[:, 0]), good[:5, 0]),
        (GaussianDetector.fit(good[:, 0], keep="npca", explained=0.5), good[:5, 0]),
        (PositionGaussians.fit(good), good[:5]),
        (GaussianHead.fit(good[:, 0], labels), good[:5, 0]),
        (VonMisesFisherHead.fit(good[:, 0], labels), good[:5]),
    ]
    for layer, x in layers:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), atol=0, rtol=0)
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: batch},))
        torch.testing.assert_close(program.module()(x[:3]), layer(x[:3]), atol=0, rtol=0)
        alone = torch.cat([layer(one[None]) for one in x])
        torch.testing.assert_close(alone, layer(x), atol=1e-6, rtol=1e-6)


def test_state_dict(generator: torch.Generator) -> None:
    x = torch.randn(20, 6, 5, generator=generator)
    fitted = PositionGaussians.fit(x)
    again = PositionGaussians(torch.zeros_like(fitted.mean), torch.zeros_like(fitted.factor))
    again.load_state_dict(fitted.state_dict())
    assert torch.equal(again(x), fitted(x))


def test_random_shapes() -> None:
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        b, p, d = (int(torch.randint(1, high, (), generator=g)) for high in (12, 9, 60))
        x, mean = torch.randn(b, p, d, generator=g), torch.randn(p, d, generator=g)
        covariance = torch.stack([spd(g, d) for _ in range(p)])
        got = measure_mahalanobis(x, mean, factor_covariance(covariance)).double()
        delta = x.double() - mean.double()
        truth = torch.einsum("bpc,pcd,bpd->bp", delta, torch.linalg.inv(covariance), delta).sqrt()
        torch.testing.assert_close(got, truth, atol=1e-6, rtol=1e-4, msg=f"seed {seed}")


def test_errors(generator: torch.Generator) -> None:
    x, mean, factor = torch.zeros(2, 3, 4), torch.zeros(3, 4), torch.zeros(3, 10)
    with pytest.raises(ValueError, match=r"factor must be \[3, 10\] for x \[2, 3, 4\], got \[3, 9\]"):
        measure_mahalanobis(x, mean, factor[:, :9])
    with pytest.raises(ValueError, match=r"mean must be \[3, 4\]"):
        measure_mahalanobis(x, mean[:2], factor)
    with pytest.raises(TypeError, match=r"factor must be float32 or bfloat16, got torch\.float16"):
        measure_mahalanobis(x, mean, factor.half())
    with pytest.raises(ValueError, match=r"x must be \[B, P, d\]"):
        measure_mahalanobis(x[0], mean, factor)
    singular = torch.stack([torch.eye(4), torch.ones(4, 4)])
    with pytest.raises(torch.linalg.LinAlgError, match="position 1 is singular; shrink it"):
        factor_covariance(singular)
    with pytest.raises(ValueError, match=r"covariance must be \[d, d\] or \[P, d, d\]"):
        factor_covariance(torch.zeros(3, 4))
    with pytest.raises(torch.linalg.LinAlgError, match="singular"):
        PositionGaussians.fit(torch.randn(3, 2, 8, generator=generator), regularization=0.0)
    with pytest.raises(ValueError, match="N at least 2"):
        PositionGaussians.fit(x[:1])
    with pytest.raises(ValueError, match="keep must be all, pca or npca, got 'most'"):
        GaussianDetector.fit(x[0], keep="most")
    with pytest.raises(ValueError, match="needs the features"):
        GaussianDetector.fit(Moments(4), keep="pca")
    with pytest.raises(ValueError, match="sigma must be above 0 and below 8"):
        GaussianDetector.fit(torch.randn(9, 4, generator=generator)).threshold(8)
