"""average_by_power against its definition, its special exponents, and GroupedPowerMean."""

from typing import Any

import pytest
import torch

from planmill.kernels.attention import GroupedPowerMean, average_by_power
from planmill.kernels.attention.generalized_mean.reference import generalized_mean_reference


def positive(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) * scale + 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("scale", [1e-4, 1.0, 100.0, 1e4])
def test_agrees_with_the_definition(dtype: torch.dtype, scale: float) -> None:
    p = torch.tensor([3.0, 1.0, 40.0, 300.0, -1.0, -50.0, 0.0, 1e-6, -0.05, 0.2, 0.099, 0.101])
    x = ((torch.randn(3, 77, 24, generator=torch.Generator().manual_seed(0)) + 0.5) * scale).to(dtype)
    want = generalized_mean_reference(x, p, 1e-6)
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(average_by_power(x, p), want, atol=0, rtol=tolerance)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    torch.testing.assert_close(average_by_power(strided, p), want, atol=0, rtol=tolerance)


def test_special_exponents() -> None:
    x = positive(2, 50, 4)
    for p, want in (
        (1.0, x.mean(1)),
        (-1.0, 1 / (1 / x).mean(1)),
        (0.0, x.log().mean(1).exp()),
        (2.0, x.square().mean(1).sqrt()),
        (1e4, x.amax(1)),
    ):
        torch.testing.assert_close(average_by_power(x, torch.tensor([p])), want, atol=0, rtol=1e-3 if p > 9 else 1e-5)
    huge = x * 1e30  # the tenth power leaves float32
    want = (x.double().pow(10).mean(1).pow(0.1) * 1e30).float()
    torch.testing.assert_close(average_by_power(huge, torch.tensor([10.0])), want, atol=0, rtol=1e-5)
    assert average_by_power(-x, torch.tensor([3.0])).allclose(torch.tensor(1e-6))
    assert average_by_power(x[:, :1], torch.tensor([3.0])).allclose(x[:, 0])
    x[1, 3, 2] = torch.nan
    assert average_by_power(x, torch.tensor([3.0])).isnan().nonzero().tolist() == [[1, 2]]


def test_layer_gradient_and_one_graph() -> None:
    """Groups, images, gradients of x and p against the definition, torch.compile(fullgraph=True) and export."""
    layer = GroupedPowerMean(6, 3)
    with torch.no_grad():
        layer.p.copy_(torch.tensor([3.0, 0.05, -2.0]))
    x = positive(2, 9, 6).requires_grad_()
    layer(x).square().sum().backward()
    z, p = x.detach().double().requires_grad_(), layer.p.detach().double().requires_grad_()
    generalized_mean_reference(z, p, 1e-6).square().sum().backward()
    assert x.grad is not None
    assert layer.p.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(layer.p.grad.double(), p.grad, atol=1e-5, rtol=1e-3)
    with torch.no_grad():
        image = x.detach().transpose(1, 2).unflatten(2, (3, 3))
        torch.testing.assert_close(layer(image), layer(x), atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(layer(x[1:]), layer(x)[1:], atol=0, rtol=1e-6)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({1: tokens},))
        more = positive(2, 150, 6, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, p: average_by_power(x[0], p), ValueError, r"x must be \[B, N, C\], got \[5, 6\]"),
        (lambda x, p: average_by_power(x.double(), p), TypeError, "x must be float32.* got torch.float64"),
        (lambda x, p: average_by_power(x, p[:, None]), ValueError, r"p must be \[G\], got \[2, 1\]"),
        (lambda x, p: average_by_power(x[..., :5], p), ValueError, "p must have a length that divides the 5 channels"),
        (lambda x, p: average_by_power(x[:, :0], p), ValueError, r"x must have tokens, got \[2, 0, 6\]"),
        (lambda x, p: average_by_power(x, p, eps=0.0), ValueError, "eps must be above 0, got 0.0"),
        (lambda x, p: GroupedPowerMean(6, 4), ValueError, "groups must divide the 6 channels, got 4"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(positive(2, 5, 6), torch.tensor([1.0, 2.0]))
