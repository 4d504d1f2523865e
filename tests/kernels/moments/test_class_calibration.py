"""calibrate_moments: its definition in float64, ties, NaN, singular covariances, settings, errors."""

import pytest
import torch

from planmill.kernels.moments import calibrate_moments
from planmill.kernels.moments.class_calibration.reference import calibration_reference


def classes(count: int, d: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    rows = torch.randn(count, d + 5, d, generator=generator)
    means = 3 * torch.randn(count, d, generator=generator)
    return means, rows.mT @ rows / (d + 5)


@pytest.mark.parametrize(
    ("neighbors", "mixing", "spread"), [(1, 0.5, 0.0), (3, 0.3, 0.2), (6, 1.0, 0.0), (2, 0.0, 1.0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_definition(
    neighbors: int, mixing: float, spread: float, dtype: torch.dtype, generator: torch.Generator
) -> None:
    means, covariances = (x.to(dtype) for x in classes(4, 7, generator))
    head_means, head_covariances = (x.to(dtype) for x in classes(6, 7, generator))
    counts = torch.randint(1, 500, (6,), generator=generator)
    given = (means, covariances, head_means, head_covariances, counts)
    got = calibrate_moments(*given, neighbors=neighbors, mixing=mixing, spread=spread)
    want = calibration_reference(*given, neighbors, mixing, spread)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w.float(), atol=1e-6, rtol=1e-6)


def test_one_shot_class_becomes_regular(generator: torch.Generator) -> None:
    head = classes(5, 6, generator)
    got = calibrate_moments(torch.randn(2, 6, generator=generator), torch.zeros(2, 6, 6), *head, torch.full((5,), 80))
    torch.linalg.cholesky(got.covariances)
    assert torch.equal(got.covariances, got.covariances.mT)


def test_ties_and_nan() -> None:
    head = torch.tensor([[1.0, 0.0], [0.0, 1.0], [torch.nan, 0.0]])
    covariances = torch.eye(2) * torch.tensor([1.0, 2.0, 3.0])[:, None, None]
    tail = torch.tensor([[0.0, 0.0], [torch.nan, 1.0]])
    got = calibrate_moments(tail, torch.zeros(2, 2, 2), head, covariances, torch.ones(3), neighbors=1, mixing=1.0)
    assert torch.equal(got.means[0], head[0])  # both are at distance 1: the first
    assert torch.equal(got.covariances[0], covariances[0])
    assert got.means[1].isnan().any()
    empty = calibrate_moments(tail[:0], torch.zeros(0, 2, 2), head, covariances, torch.ones(3), neighbors=2)
    assert empty.means.shape == (0, 2)
    assert empty.covariances.shape == (0, 2, 2)


def test_errors(generator: torch.Generator) -> None:
    tail, head, counts = classes(2, 4, generator), classes(3, 4, generator), torch.ones(3)
    for arguments, settings, words in (
        ((tail[0][0], tail[1], *head, counts), {}, r"means must be \[K, d\]"),
        ((tail[0], tail[1][:1], *head, counts), {}, r"covariances must be \[2, 4, 4\]"),
        ((*tail, head[0][:, :3], head[1], counts), {}, r"head_means must be \[H, 4\]"),
        ((*tail, *head, counts[:2]), {}, r"head_counts must be \[3\]"),
        ((*tail, *head, counts - 1), {}, r"head_counts must be at least 1, got 0"),
        ((*tail, *head, counts), {"neighbors": 4}, r"neighbors must be from 1 to 3, got 4"),
        ((*tail, *head, counts), {"mixing": 1.5}, r"mixing must be from 0 to 1"),
        ((*tail, *head, counts), {"spread": float("nan")}, r"spread at least 0"),
    ):
        with pytest.raises(ValueError, match=f"calibrate_moments: .*{words}"):
            calibrate_moments(*arguments, **settings)
    with pytest.raises(TypeError, match="means"):
        calibrate_moments(tail[0].int(), tail[1], *head, counts)
