"""The HyperZ.Z.W products against their definitions, and the layers around them."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention import (
    GlobalHyperKernel,
    LocalHyperKernel,
    SlowNet,
    filter_by_sample,
    gate_by_kernels,
    multiply_with_kernel,
)
from planmill.kernels.attention.hyper_kernels import reference


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("size", [1, 7, 17])
def test_products_agree_with_the_definitions(dtype: torch.dtype, size: int) -> None:
    z = normal(3, 4, size, size).to(dtype)
    strided = z.transpose(0, 1).contiguous().transpose(0, 1)
    exact: Any = {"atol": 1e-5, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 1e-4, "rtol": 8e-3}
    kernel, kernels = normal(4, size, size, seed=1), normal(3, 4, 5, 5, seed=2)
    for twice in (True, False):
        want = reference.global_reference(z, kernel, twice)
        torch.testing.assert_close(multiply_with_kernel(strided, kernel, twice=twice), want, **exact)
    want = reference.gate_reference(z, kernel[:, 0, 0], kernel[0])
    torch.testing.assert_close(gate_by_kernels(strided, kernel[:, 0, 0], kernel[0]), want, **exact)
    image = z[:, :, :, : size // 2 + 1]
    torch.testing.assert_close(filter_by_sample(image, kernels), reference.filter_reference(image, kernels), **exact)


def test_slow_net_is_its_formula() -> None:
    net = SlowNet(3, 5, hidden=4, layers=2)
    for index, parameter in enumerate(net.parameters()):
        parameter.data = normal(*parameter.shape, seed=index)
    state = {name: value.double() for name, value in net.state_dict().items()}

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    c = torch.tensor([[y, x] for y in (-1, -0.5, 0, 0.5, 1) for x in (-1, -0.5, 0, 0.5, 1)]).double()
    scale = normal(2, 2, 4, seed=50)
    for modulation in (None, scale):
        h = linear("filters.0", c).sin().expand(1 if modulation is None else 2, -1, -1)
        for i in (0, 1):
            h = linear(f"filters.{i + 1}", c).sin() * linear(f"linears.{i}", h) + state[f"shifts.{i}"]
            h = h if modulation is None else h * modulation[:, i, None].double()
        want = linear("out", h).transpose(1, 2).reshape(-1, 3, 5, 5)
        got = net(modulation).double()
        torch.testing.assert_close(got, want[0] if modulation is None else want, atol=1e-4, rtol=1e-4)


def test_samples_depend_on_each_other_only_where_asked() -> None:
    z1, z2 = normal(3, 4, 8, 9), normal(3, 4, 8, 9, seed=1)
    alone, coupled = LocalHyperKernel(4), LocalHyperKernel(4, batch_mean=True)
    coupled.load_state_dict(alone.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(alone(z1[1:2], z2[1:2]), alone(z1, z2)[1:2], atol=1e-6, rtol=1e-6)
        assert (coupled(z1[1:2], z2[1:2]) - coupled(z1, z2)[1:2]).abs().max() > 1e-6
        torch.testing.assert_close(coupled(z1[1:2], z2[1:2]), alone(z1[1:2], z2[1:2]))
        pooled = alone.reduce(F.adaptive_avg_pool2d(z1, 3)).flatten(1)
        kernels = alone.slow(F.gelu(alone.fc(pooled)).view(3, 2, 16))
        want = F.gelu(alone.mix(reference.filter_reference(z2, kernels))) + alone.bias
        torch.testing.assert_close(alone(z1, z2), want, atol=1e-5, rtol=1e-5)


class Both(nn.Module):
    """Both layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.far, self.near = GlobalHyperKernel(3, 6, hidden=4), LocalHyperKernel(3, hidden=4)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.near(z, self.far(z))


def test_gradient_and_one_graph() -> None:
    """A gradient for every parameter, against float64; torch.compile(fullgraph=True); export of any batch."""
    layer = Both()
    z = normal(2, 3, 6, 6)
    layer(z).square().sum().backward()
    kernel = layer.far.slow().detach().requires_grad_()
    exact = kernel.detach().double().requires_grad_()
    multiply_with_kernel(z, kernel).square().sum().backward()
    ((z.double() * exact) @ z.double()).square().sum().backward()
    assert kernel.grad is not None
    torch.testing.assert_close(kernel.grad.double(), exact.grad, atol=1e-4, rtol=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(z), layer(z))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (z,), dynamic_shapes=({0: batch},))
        more = normal(5, 3, 6, 6, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda z: multiply_with_kernel(z[0], z[0]), ValueError, r"z must be \[B, C, S, S\], got \[3, 4, 4\]"),
        (lambda z: multiply_with_kernel(z[..., :2], z[0]), ValueError, r"z must be \[B, C, S, S\], got \[2, 3, 4, 2\]"),
        (lambda z: multiply_with_kernel(z, z), ValueError, r"kernel must be \[3, 4, 4\] for z \[2, 3, 4, 4\]"),
        (lambda z: multiply_with_kernel(z.double(), z[0]), TypeError, "z must be float32.* got torch.float64"),
        (lambda z: gate_by_kernels(z, z[0, 0, 0], z[0, 0]), ValueError, r"channel_kernel must be \[3\] for z .* got"),
        (lambda z: filter_by_sample(z, z[0]), ValueError, r"kernels must be \[B, C, k, k\], got \[3, 4, 4\]"),
        (lambda z: filter_by_sample(z, z), ValueError, r"with k odd, got \[2, 3, 4, 4\]"),
        (lambda z: LocalHyperKernel(3, 4), ValueError, "kernel must be odd, got 4"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 3, 4, 4))
