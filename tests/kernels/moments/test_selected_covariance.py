"""The penalty on chosen covariances against all of them, masked; and its messages."""

import pytest
import torch

from planmill.kernels.moments import penalize_covariances


@pytest.mark.parametrize("margin", [0.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_masked_covariance(generator: torch.Generator, dtype: torch.dtype, margin: float) -> None:
    x = (torch.randn(4, 9, 5, 7, generator=generator) + 0.3).to(dtype)
    x[1] /= 8  # below the margin
    mask = (torch.rand(9, 9, generator=generator) < 0.2).triu(1)
    maps = x.double().flatten(2).requires_grad_()
    covariances = maps @ maps.mT / 34
    want = (((covariances.abs() * mask).sum((1, 2)) - margin) / mask.sum()).clamp_min(0).mean()
    want.backward()
    mine = x.detach().requires_grad_()
    got = penalize_covariances(mine, mask.nonzero(), margin=margin)
    got.backward()
    torch.testing.assert_close(got.double(), want, atol=1e-6, rtol=1e-5)
    assert mine.grad is not None
    assert maps.grad is not None
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(mine.grad.double().flatten(2), maps.grad, atol=tolerance * 0.1, rtol=tolerance)


def test_nothing_costs_nothing() -> None:
    pairs = torch.zeros(0, 2, dtype=torch.int64)
    assert float(penalize_covariances(torch.randn(2, 3, 4), pairs)) == 0
    assert float(penalize_covariances(torch.randn(0, 3, 4), torch.tensor([[0, 1]]))) == 0


@pytest.mark.parametrize(
    ("shape", "pairs", "error", "message"),
    [
        ((3, 4), [[0, 1]], ValueError, r"x must be \[B, C, H, W\] or \[B, C, HW\], got \[3, 4\]"),
        ((2, 3, 1), [[0, 1]], ValueError, "two positions at least"),
        ((2, 3, 4), [0, 1], ValueError, r"pairs must be \[m, 2\], got \[2\]"),
        ((2, 3, 4), [[0.0, 1.0]], TypeError, "pairs must be int32 or int64, got torch.float32"),
    ],
)
def test_messages(shape: tuple, pairs: list, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        penalize_covariances(torch.zeros(shape), torch.tensor(pairs))
