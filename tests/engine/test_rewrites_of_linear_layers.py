"""Linear layers packed beforehand: which ones, with which activation, and that they compute the same."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine import DynamicDim, capture
from planmill.engine.capture import Captured
from planmill.engine.rewrites import PASSES, rewrite

SMALL = DynamicDim("batch", 1, 3, 4)
PASS = ["packed_linear"]
OP = torch.ops.planmill.packed_linear.default


def packed(captured: Captured) -> list[Any]:
    """The packed layers of a program, in order."""
    return [node for node in captured.program.graph.nodes if node.target is OP]


class Tokens(nn.Module):
    """An image cut into patches, and linear layers with every activation behind one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 20, (4, 2), (4, 2))
        self.layers = nn.ModuleList(nn.Linear(20, 20, bias=i != 2) for i in range(6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.patches(x).flatten(2).transpose(1, 2)
        a, b, c, d, e, f = (layer(y + i) for i, layer in enumerate(self.layers))
        y = F.gelu(a) + F.gelu(b, approximate="tanh") * F.relu(c) + F.silu(d) - torch.tanh(e)
        return y, F.relu(f), f


@torch.no_grad()
def test_layers_with_their_activations_compute_the_same() -> None:
    torch.manual_seed(0)
    model = Tokens().eval()
    captured = capture(model, torch.rand(3, 3, 12, 10), dynamic=SMALL)
    rewritten = rewrite(captured, PASS)
    assert rewritten.rewrites == PASS
    assert rewritten.ops == ["planmill::packed_linear"]
    activations = [node.args[3] for node in packed(rewritten)]
    assert activations == ["none", "gelu", "gelu_tanh", "relu", "silu", "none", "none"]
    left = {node.target for node in rewritten.program.graph.nodes}
    assert not left & {torch.ops.aten.linear.default, torch.ops.aten.conv2d.default, torch.ops.aten.gelu.default}
    samples = torch.rand(3, 3, 12, 10), 3 * torch.randn(1, 3, 12, 10)
    found = [rewritten.program.module()(x) for x in samples]
    model.double()
    for x, got in zip(samples, found, strict=True):
        for one, want in zip(got, model(x.double()), strict=True):
            assert (one - want).abs().max() <= 2e-6 * (1 + want.abs().max())


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 4, 5, 5),  # leaves a border out
        nn.Conv2d(3, 4, 4, 2),
        nn.Conv2d(3, 4, 2, 2, padding=1),
        nn.Conv2d(3, 3, 2, 2, groups=3),
        nn.Conv2d(3, 4, 2, 2, dilation=2),
        nn.Conv2d(3, 4, 1),
    ],
)
def test_other_convolutions_stay_as_they_are(layer: nn.Conv2d) -> None:
    captured = capture(nn.Sequential(layer).eval(), torch.rand(3, 3, 12, 8), dynamic=SMALL)
    assert rewrite(captured, PASS) is captured


class Vectors(nn.Module):
    """Products with one vector of weights, which are no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.w = nn.Parameter(torch.rand(6)), nn.Parameter(torch.rand(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x * 2 + 1, self.w) - 0.5, self.v) * 2 + 1


def test_vectors_of_weights_stay_as_they_are() -> None:
    captured = capture(Vectors().eval(), torch.rand(3, 6, 8), dynamic=SMALL)
    assert rewrite(captured, PASSES) is captured


class Products(nn.Module):
    """A weight that depends on the input."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, x[0])


def test_weights_that_are_no_constants_stay_as_they_are() -> None:
    captured = capture(Products().eval(), torch.rand(3, 5, 8), dynamic=SMALL)
    assert rewrite(captured, PASS) is captured


class Broadcast(nn.Module):
    """Linear layers with the biases that torch broadcasts: one number, a row, a row for each token."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.rand(8, 8))
        self.biases = nn.ParameterList(torch.rand(shape) for shape in ((1,), (1, 8), (5, 8)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for bias in self.biases:
            x = F.linear(2 * x + 1, self.w, bias) - 0.5
        return F.linear(x, self.w, self.biases[0])


def test_biases_that_are_broadcast_stay_as_they_are() -> None:
    captured = capture(Broadcast().eval(), torch.rand(5, 8), dynamic=None)
    assert rewrite(captured, PASSES) is captured


class Shared(nn.Module):
    """One layer that is run again and again, and one of no inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.again, self.empty = nn.Linear(8, 8), nn.Linear(0, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = torch.tanh(self.again(x))
        return x + self.empty(x[..., :0]) * 2


@torch.no_grad()
def test_a_shared_layer_is_packed_once() -> None:
    model, x = Shared().eval(), torch.rand(3, 8)
    rewritten = rewrite(capture(model, x, dynamic=SMALL), PASSES)
    layers = packed(rewritten)
    assert len(layers) == 3
    assert len({(node.args[1], node.args[2]) for node in layers}) == 1
    torch.testing.assert_close(rewritten.program.module()(x)[0], model(x))
