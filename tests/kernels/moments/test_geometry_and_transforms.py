"""compare_prototypes, score_attenuation and transform_features: definitions in float64, ties, NaN, blocks, errors."""

import pytest
import torch

from planmill.kernels.moments import compare_prototypes, score_attenuation, transform_features
from planmill.kernels.moments.class_geometry import functions
from planmill.kernels.moments.class_geometry.reference import attenuation_reference, prototype_reference
from planmill.kernels.moments.feature_transform.reference import feature_transform_reference

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


@DTYPES
@pytest.mark.parametrize("block", [7, 1 << 22])
def test_they_are_their_definitions(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, block: int) -> None:
    """Random sizes; rows all in one block, and one by one."""
    monkeypatch.setattr(functions, "BLOCK", block)
    for seed in range(10):
        g = torch.Generator().manual_seed(seed)
        n, d, classes = (int(torch.randint(low, 40, (), generator=g)) for low in (1, 1, 2))
        x = (torch.randn(n, d, generator=g) * 3).to(dtype)
        weight, labels = torch.randn(classes, d, generator=g), torch.randint(0, classes, (n,), generator=g)
        reference = torch.randn(classes, 2 * d, generator=g)
        for got, want in (
            (compare_prototypes(x, weight, labels.int()), prototype_reference(x, weight, labels)),
            (score_attenuation(x, weight, reference), attenuation_reference(x, weight, reference)),
        ):
            for g_part, w_part in zip(got, want, strict=True):
                if g_part.dtype is torch.int32:
                    if d > 1:  # in one dimension all cosines are 1 or -1, and rounding decides
                        assert torch.equal(g_part.long(), w_part), f"seed {seed}"
                else:
                    torch.testing.assert_close(g_part.double(), w_part, atol=1e-5, rtol=1e-5)


def test_ties_zeros_nan_and_no_rows() -> None:
    eye = torch.eye(3)
    angles = compare_prototypes(torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]), eye, torch.tensor([0, 1]))
    assert angles.nearest.tolist() == [1, 0]
    assert angles.negative.tolist() == pytest.approx([3**-0.5, 0.0])
    weight = torch.tensor([[1.0, 0.0], [torch.nan, 0.0], [2.0, 0.0]])
    scored = score_attenuation(torch.tensor([[1.0, 0.0], [torch.nan, 1.0]]), weight, torch.ones(3, 4))
    assert scored.predicted.tolist()[0] == 2
    assert scored.logit.tolist()[0] == 2.0
    assert bool(scored.logit[1].isnan())
    assert bool(scored.cosine[1].isnan())
    assert float(score_attenuation(torch.zeros(1, 2), eye[:, :2], torch.ones(3, 4)).cosine) == 0.0
    assert compare_prototypes(torch.empty(0, 3), eye, torch.empty(0, dtype=torch.int64)).positive.shape == (0,)
    assert score_attenuation(torch.empty(0, 2), eye[:, :2], torch.ones(3, 4)).predicted.dtype is torch.int32


@DTYPES
@pytest.mark.parametrize(("kind", "exponent"), [("power", 0.5), ("power", 2.0), ("log", None), ("importance", 1.3)])
def test_transforms_are_their_definitions(
    generator: torch.Generator, dtype: torch.dtype, kind: str, exponent: float | None
) -> None:
    x = torch.randn(7, 33, generator=generator) * torch.logspace(-9, 1, 33)
    x[3] = 0.0
    x = x.to(dtype).T
    got, want = transform_features(x, kind, exponent=exponent), feature_transform_reference(x, kind, exponent or 1.0)
    assert got.dtype is dtype
    rtol = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(got, want, atol=1e-7 if dtype is torch.float16 else 1e-30, rtol=rtol)
    assert not bool(got[:, 3].any())


def test_errors() -> None:
    x, weight, labels = torch.randn(4, 3), torch.randn(2, 3), torch.tensor([0, 1, 2, 0])
    with pytest.raises(ValueError, match="labels must be from 0 to 1, got 2 in row 2"):
        compare_prototypes(x, weight, labels)
    with pytest.raises(ValueError, match=r"labels must be \[4\] like features, got \[3\]"):
        compare_prototypes(x, weight, labels[:3])
    with pytest.raises(TypeError, match=r"labels must be int64 or int32, got torch\.float32"):
        compare_prototypes(x, weight, labels.float())
    with pytest.raises(ValueError, match=r"prototypes must be \[K, 3\] with K at least 2, got \[1, 3\]"):
        compare_prototypes(x, weight[:1], labels)
    with pytest.raises(TypeError, match="weight must be of a float dtype"):
        score_attenuation(x, weight.int(), torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"reference must be a float \[2, 6\], got \[2, 3\]"):
        score_attenuation(x, weight, weight)
    with pytest.raises(ValueError, match="kind must be one of power, log, importance, got 'root'"):
        transform_features(x, "root")
    for kind, exponent in (("power", 0.0), ("log", 1.0)):
        with pytest.raises(ValueError, match="exponent must be above 0"):
            transform_features(x, kind, exponent=exponent)
    with pytest.raises(TypeError, match="x must be"):
        transform_features(x.double())
