"""covariance_moments, Moments and shrinkage: float64 truth, merging in any order, scikit-learn, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.covariance import OAS, EmpiricalCovariance, LedoitWolf, ShrunkCovariance

from planmill.kernels import cpu_capabilities, cpu_capability
from planmill.kernels.moments import (
    Moments,
    covariance_moments,
    ridge_precision,
    shrink_by,
    shrink_ledoit_wolf,
    shrink_oas,
)

FIELDS = ("count", "mean", "scatter", "third", "fourth")


def correlated(g: torch.Generator, n: int, d: int, mean: float = 0.0) -> torch.Tensor:
    """Rows whose variances span six orders of magnitude."""
    mix = torch.randn(d, d, generator=g) * torch.logspace(0, -3, d)
    return torch.randn(n, d, generator=g) @ mix + mean


def relative(got: torch.Tensor, x: torch.Tensor, correction: int = 1) -> float:
    """Largest error of a covariance by the standard deviations of its two channels, against float64."""
    truth = torch.cov(x.double().T, correction=correction)
    deviation = truth.diagonal().sqrt()
    return float(((got.double() - truth) / (deviation[:, None] * deviation)).abs().max())


@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_covariance_against_float64(generator: torch.Generator, dtype: torch.dtype, mean: float) -> None:
    x = (torch.randn(3000, 50, generator=generator) * 30 + mean).to(dtype)
    result = covariance_moments(x)
    assert result.samples == 3000
    assert relative(result.covariance, x) < 2e-6
    torch.testing.assert_close(result.mean.double(), x.double().mean(0), atol=1e-5, rtol=1e-6)
    assert torch.equal(result.covariance, result.covariance.T)


def test_it_is_more_accurate_than_torch_cov_far_from_the_origin(generator: torch.Generator) -> None:
    x = torch.randn(5000, 40, generator=generator) + 1000.0
    assert relative(covariance_moments(x).covariance, x) <= relative(torch.cov(x.T), x)


def test_sets_are_independent(generator: torch.Generator) -> None:
    x = torch.randn(5, 196, 33, generator=generator)
    together = covariance_moments(x, correction=0)
    for i in range(5):
        alone = covariance_moments(x[i], correction=0)
        assert torch.equal(together.covariance[i], alone.covariance)
        assert torch.equal(together.mean[i], alone.mean)


def test_the_number_of_threads_changes_nothing(generator: torch.Generator) -> None:
    x = torch.randn(2000, 70, generator=generator)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(covariance_moments(x).covariance)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("level", cpu_capabilities() or ("reference",))
def test_random_shapes(level: str) -> None:
    for seed in range(25):
        g = torch.Generator().manual_seed(seed)
        n, d = (int(torch.randint(2, high, (), generator=g)) for high in (1400, 120))
        x = torch.randn(n, d, generator=g) * float(10 ** torch.randint(-6, 6, (), generator=g))
        x = x + float(torch.randint(0, 100, (), generator=g))
        if level == "reference":
            got = covariance_moments(x)
        else:
            with cpu_capability(level):
                got = covariance_moments(x)
        truth = torch.cov(x.double().T).reshape(d, d)
        bound = 2e-6 * (truth.diagonal()[:, None] * truth.diagonal()).sqrt() + 1e-40
        assert bool(((got.covariance - truth).abs() <= bound).all()), f"seed {seed}: {n} x {d}"


def test_merging_in_any_order(generator: torch.Generator) -> None:
    x = correlated(generator, 1000, 24, mean=50.0)
    whole = Moments(24).update(x)
    for seed in range(7):
        g = torch.Generator().manual_seed(seed)
        cuts = torch.randint(1, 1000, (6,), generator=g).unique().tolist()
        parts = [Moments(24).update(part) for part in torch.tensor_split(x, cuts)]
        while len(parts) > 1:
            i, j = torch.randperm(len(parts), generator=g)[:2].tolist()
            parts[i].merge(parts[j])
            del parts[j]
        assert int(parts[0].count) == 1000
        torch.testing.assert_close(parts[0].mean, whole.mean, atol=1e-5, rtol=1e-6)
        assert relative(parts[0].covariance(), x) < 1e-6
        for name in ("third", "fourth"):
            got, want = getattr(parts[0], name), getattr(whole, name)
            assert float((got - want).abs().max()) < 1e-5 * float(whole.fourth) ** (0.75 if name == "third" else 1.0)


def test_an_empty_accumulator_is_neutral(generator: torch.Generator) -> None:
    x = torch.randn(30, 5, generator=generator)
    left, right = Moments(5).merge(Moments(5).update(x)), Moments(5).update(x).merge(Moments(5))
    for name in FIELDS:
        assert torch.equal(getattr(left, name), getattr(right, name))
    assert int(Moments(5).merge(Moments(5)).count) == 0
    assert int(Moments(5).update(x[:0]).count) == 0


def test_save_and_load(tmp_path: Path, generator: torch.Generator) -> None:
    moments = Moments(6).update(torch.randn(40, 6, generator=generator))
    moments.save(tmp_path / "m.safetensors")
    again = Moments.load(tmp_path / "m.safetensors")
    for name in FIELDS:
        assert torch.equal(getattr(again, name), getattr(moments, name))
    (tmp_path / "other.safetensors").write_bytes(b"no such file")
    with pytest.raises(ValueError, match="is no saved Moments"):
        Moments.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(("n", "d"), [(500, 40), (20, 40), (3, 1), (200, 7)])
def test_shrinkage_equals_scikit_learn(generator: torch.Generator, n: int, d: int) -> None:
    """Oracle: scikit-learn (BSD-3)."""
    x = correlated(generator, n, d, mean=3.0)
    moments = Moments(d)
    for part in x.split(37):
        moments.update(part)
    rows = x.double().numpy()
    for ours, theirs in ((shrink_ledoit_wolf(moments), LedoitWolf()), (shrink_oas(moments), OAS())):
        theirs.fit(rows)
        assert abs(ours.shrinkage - theirs.shrinkage_) < 1e-6
        np.testing.assert_allclose(ours.covariance.numpy(), theirs.covariance_, atol=1e-6 * theirs.covariance_.max())
    plain = EmpiricalCovariance().fit(rows).covariance_
    np.testing.assert_allclose(moments.covariance(0).numpy(), plain, atol=1e-6 * plain.max())


def test_constant_data_shrinks_to_nothing() -> None:
    moments = Moments(4).update(torch.full((10, 4), 2.5))
    assert shrink_ledoit_wolf(moments).shrinkage == 0.0
    assert shrink_oas(moments).shrinkage == 1.0
    with pytest.raises(torch.linalg.LinAlgError, match="all rows are equal"):
        ridge_precision(moments)


def test_ridge_precision_is_the_published_formula(generator: torch.Generator) -> None:
    x = correlated(generator, 12, 30)
    s = torch.cov(x.double().T)
    published = 30 * torch.linalg.pinv(11 * s + s.trace() * torch.eye(30, dtype=torch.float64))
    torch.testing.assert_close(ridge_precision(Moments(30).update(x)), published, atol=0.0, rtol=1e-4)


def test_compiled(generator: torch.Generator) -> None:
    x = torch.randn(50, 8, generator=generator)
    compiled = torch.compile(lambda x: covariance_moments(x), fullgraph=True)
    assert torch.equal(compiled(x).covariance, covariance_moments(x).covariance)


def test_errors(generator: torch.Generator) -> None:
    x = torch.randn(4, 3, generator=generator)
    with pytest.raises(ValueError, match=r"covariance: x must be \[N, d\] or \[B, N, d\], got \[3\]"):
        covariance_moments(x[0])
    with pytest.raises(ValueError, match="must have more than 1 rows, got 1"):
        covariance_moments(x[:1])
    with pytest.raises(TypeError, match=r"float32, bfloat16 or float16, got torch\.float64"):
        covariance_moments(x.double())
    x[2, 1] = torch.nan
    with pytest.raises(ValueError, match=r"NaN or infinity in row 2$"):
        covariance_moments(x)
    with pytest.raises(ValueError, match="NaN or infinity in row 2 of set 1"):
        covariance_moments(torch.stack([torch.zeros_like(x), x]))
    moments = Moments(3)
    with pytest.raises(ValueError, match="row 2"):
        moments.update(x)
    assert int(moments.count) == 0
    with pytest.raises(ValueError, match="needs more than 1 rows, got 0"):
        moments.covariance()
    with pytest.raises(ValueError, match=r"x must be \[N, 3\], got \[4, 2\]"):
        moments.update(torch.zeros(4, 2))
    with pytest.raises(ValueError, match="other must have width 3, got 2"):
        moments.merge(Moments(2))
    with pytest.raises(ValueError, match="needs at least one row"):
        shrink_ledoit_wolf(moments)
    with pytest.raises(ValueError, match="width must be at least 1"):
        Moments(0)


def test_shrinkage_by_a_given_share(generator: torch.Generator) -> None:
    """Oracle: scikit-learn (BSD-3)."""
    x = torch.randn(12, 20, generator=generator) + 2
    for share in (0.0, 0.3, 1.0):
        wanted = ShrunkCovariance(shrinkage=share).fit(x.double().numpy()).covariance_
        got = shrink_by(Moments(20).update(x), share)
        np.testing.assert_allclose(got.covariance.numpy(), wanted, atol=1e-6)
        assert got.shrinkage == share
    with pytest.raises(ValueError, match=r"shrink_by: shrinkage must be from 0 to 1, got 1\.5"):
        shrink_by(Moments(20).update(x), 1.5)
    with pytest.raises(ValueError, match="shrink_by: needs at least one row, got none"):
        shrink_by(Moments(20), 0.5)
