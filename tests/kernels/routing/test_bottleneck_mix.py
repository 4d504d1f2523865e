"""BottleneckMix against its formula, sample by sample, and its messages."""

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.routing import BottleneckMix
from planmill.kernels.routing.expert_mixture.reference import ACTIVATIONS


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def formula(x: torch.Tensor, layer: BottleneckMix) -> torch.Tensor:
    """[B, N, C] in float64: one filter after the other, for each sample or position."""
    p = {name: value.double() for name, value in layer.named_parameters()}
    x = x.double()
    seen = x.mean(1, keepdim=True) if layer.gate_by == "sample" else x
    found = F.linear(seen, p["gate.weight"], p["gate.bias"]).topk(layer.k, 2)
    g = torch.zeros(*seen.shape[:2], len(layer.down), dtype=torch.float64)
    g = g.scatter(2, found.indices, found.values.softmax(2))
    act = ACTIVATIONS[layer.activation]
    y = torch.zeros_like(x)
    for e in range(len(layer.down)):
        h = act(F.linear(x, p["down"][e], p["down_bias"][e]))
        y = y + g[..., e, None] * F.linear(h, p["up"][e], p["up_bias"][e])
    return x + y if layer.residual else y


@pytest.mark.parametrize("gate_by", ["sample", "position"])
@pytest.mark.parametrize(
    ("filters", "k", "hidden", "activation", "residual"),
    [(4, 2, 6, "relu", False), (1, 1, 5, "gelu", True), (5, 5, 3, "silu", True), (8, 1, None, "relu", False)],
)
def test_equals_the_formula(
    gate_by: str, filters: int, k: int, hidden: int | None, activation: str, residual: bool
) -> None:
    layer = BottleneckMix(20, filters, k, hidden, gate_by=gate_by, activation=activation, residual=residual)
    x = normal(3, 35, 20)
    want = formula(x, layer)
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)
    image = x.transpose(1, 2).reshape(3, 20, 5, 7)
    for given in (image, image.contiguous(memory_format=torch.channels_last)):
        got = layer(given)
        assert got.shape == given.shape
        torch.testing.assert_close(got.flatten(2).transpose(1, 2).double(), want, atol=1e-5, rtol=1e-5)
    half = layer.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), formula(x.bfloat16(), layer), atol=0.05, rtol=0.05)


@pytest.mark.parametrize("gate_by", ["sample", "position"])
def test_a_sample_does_not_touch_another(gate_by: str) -> None:
    layer, x = BottleneckMix(12, 4, 2, gate_by=gate_by), normal(3, 9, 12)
    alone = layer(x[1:2])
    x[0, 2], x[2] = torch.nan, torch.inf
    together = layer(x)
    torch.testing.assert_close(together[1:2], alone, atol=1e-6, rtol=1e-6)
    assert together[0].isnan().all() if gate_by == "sample" else together[0].isnan().any(1).sum() == 1


def test_equal_logits_take_the_lower_filters() -> None:
    layer, x = BottleneckMix(12, 4, 2), normal(3, 9, 12)
    torch.nn.init.zeros_(layer.gate.weight)
    torch.nn.init.zeros_(layer.gate.bias)
    halves = [layer.up[e] @ F.relu(layer.down[e] @ x.mT + layer.down_bias[e][:, None]) for e in (0, 1)]
    want = sum(h.mT + layer.up_bias[e] for e, h in enumerate(halves)) / 2
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("gate_by", ["sample", "position"])
def test_gradient_and_one_graph(gate_by: str) -> None:
    layer, x = BottleneckMix(8, 3, 2, 4, gate_by=gate_by, activation="gelu", residual=True), normal(3, 6, 8)
    x.requires_grad_()
    weights = normal(3, 6, 8, seed=2)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad((layer(x) * weights).sum(), inputs)
    want = torch.autograd.grad((formula(x, layer) * weights).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    x = x.detach()
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = normal(5, 6, 8, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


def test_messages() -> None:
    with pytest.raises(ValueError, match=r"BottleneckMix: x must be \[B, N, 8\] or \[B, 8, H, W\], got \[2, 8, 5\]"):
        BottleneckMix(8, 3)(normal(2, 8, 5))
    with pytest.raises(ValueError, match="k must be from 1 to filters = 3, got 4"):
        BottleneckMix(8, 3, 4)
    with pytest.raises(ValueError, match="gate_by must be one of sample, position, got 'image'"):
        BottleneckMix(8, 3, gate_by="image")
    with pytest.raises(ValueError, match=r"activation must be one of .* got 'tanh'"):
        BottleneckMix(8, 3, activation="tanh")
