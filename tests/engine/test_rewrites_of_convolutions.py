"""Rewrites that change how a convolution is computed: by Winograd's algorithm, with its pooling, and on an image padded
with its mean.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine import DynamicDim, capture
from planmill.engine.rewrites import PASSES, rewrite

SMALL = DynamicDim("batch", 1, 3, 4)
OP = torch.ops.planmill.winograd_convolution.default
STEM = torch.ops.planmill.stem_convolution.default


@torch.no_grad()
def test_winograd_fires_behind_a_norm_and_computes_the_same() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(40)
    norm.running_mean.normal_()  # type: ignore[union-attr]
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    first, last = nn.Conv2d(32, 40, 3, padding=1, bias=False), nn.Conv2d(40, 33, 4, padding=2)
    model = nn.Sequential(first, norm, nn.ReLU(), last).eval()
    samples = (torch.rand(3, 32, 16, 13), 3 * torch.randn(1, 32, 16, 13))
    captured = capture(model, samples[0], dynamic=SMALL)
    rewritten = rewrite(captured, PASSES)
    assert sorted(rewritten.rewrites) == ["affine_into_output", "winograd_convolution"]
    assert rewritten.ops == ["planmill::winograd_convolution"]
    assert sum(node.target is OP for node in rewritten.program.graph.nodes) == 2
    found = [(rewritten.program.module()(x)[0], captured.program.module()(x)[0]) for x in samples]
    model.double()
    for x, (got, plain) in zip(samples, found, strict=True):
        want = model(x.double())
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 4 * (plain - want).abs().max() + 4e-7 * want.abs().max()


class Strided(nn.Module):
    """What reads the memory of a convolution's result as it lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.patches = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 4, 8, 8)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = torch.view_as_real(torch.view_as_complex(self.patches(x)) * 1j)
        y = self.inner(x)
        return pairs, y.as_strided((len(y), 32, 16), (32 * 256, 256, 1)), y.view(torch.int32)


@torch.no_grad()
def test_results_that_are_read_as_they_lie_in_memory_are_contiguous() -> None:
    model, x = Strided().eval(), torch.rand(3, 32, 16, 16)
    rewritten = rewrite(capture(model, x, dynamic=None), PASSES)
    assert rewritten.rewrites == ["winograd_convolution", "packed_linear"]
    pairs, rows, bits = rewritten.program.module()(x)
    for got, want in zip((pairs, rows, bits.view(torch.float32)), (*model(x)[:2], model.inner(x)), strict=True):
        torch.testing.assert_close(got, want)


class Others(nn.Module):
    """Strides, dilation, groups, kernels and padding that are not square, few channels, few tiles, no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.whole = nn.ModuleList(
            [
                nn.Conv2d(32, 32, 3, stride=2),
                nn.Conv2d(32, 32, 3, dilation=2),
                nn.Conv2d(32, 32, 3, groups=2),
                nn.Conv2d(32, 32, 3, padding=(1, 0)),
                nn.Conv2d(32, 32, (3, 2)),
            ]
        )
        self.narrow, self.small, self.alone = nn.Conv2d(31, 32, 3), nn.Conv2d(32, 32, 3), nn.Conv2d(32, 32, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rest = self.narrow(x[:, :31]), self.small(x[:, :, :8]), self.alone(x[0])
        return *(layer(x) for layer in self.whole), *rest


def test_other_convolutions_stay_as_they_are() -> None:
    captured = capture(Others().eval(), torch.rand(3, 32, 16, 16), dynamic=SMALL)
    assert rewrite(captured, PASSES) is captured


def stems(model: nn.Module, *shape: int) -> tuple[list[tuple], set]:
    """Settings of the first layers that a rewrite made out of a model which computes the same, and all that is left."""
    captured = capture(model.eval(), torch.rand(3, *shape), dynamic=SMALL)
    rewritten = rewrite(captured, ["stem_convolution"])
    if rewritten is not captured:
        x = torch.randn(1, *shape)
        for got, want in zip(rewritten.program.module()(x), captured.program.module()(x), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
            assert got.stride() == want.contiguous(memory_format=torch.channels_last).stride()
    nodes = [node for node in rewritten.program.graph.nodes if node.op == "call_function"]
    return [node.args[3:] for node in nodes if node.target is STEM], {node.target for node in nodes} - {STEM}


@torch.no_grad()
@pytest.mark.parametrize(
    ("layers", "settings"),
    [
        ([nn.Conv2d(3, 16, 4), nn.ReLU(), nn.AvgPool2d(2)], (1, 0, "relu", "average", 2, 2, 0, True)),
        (
            [nn.Conv2d(3, 20, 7, 2, 3, bias=False), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)],
            (2, 3, "relu", "max", 3, 2, 1, True),
        ),
        ([nn.Conv2d(1, 16, (2, 3), padding=1), nn.ReLU()], (1, 1, "relu", "none", 1, 1, 0, True)),
        (
            [nn.Conv2d(8, 17, 3, 3, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)],
            (3, 1, "none", "average", 3, 1, 1, False),
        ),
    ],
    ids=str,
)
def test_a_first_layer_takes_its_activation_and_its_pooling(layers: list[nn.Module], settings: tuple) -> None:
    found, left = stems(nn.Sequential(*layers), layers[0].in_channels, 14, 18)  # type: ignore[arg-type]
    assert found == [settings]
    assert left <= {torch.ops.aten.permute.default}


class Seen(nn.Module):
    """Layers behind which stands something else, or whose result is seen by others too."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(3, 16, 3) for _ in range(6))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c, d, e, f = (layer(x) for layer in self.layers)
        pools: list[Any] = [F.max_pool2d(F.relu(a), 2, ceil_mode=True), F.avg_pool2d(F.relu(b), (2, 1))]
        pools += [F.avg_pool2d(F.relu(c), 2, divisor_override=3), F.max_pool2d(d, 2, dilation=2)]
        return *pools, F.relu(e), e, F.max_pool2d(y := F.relu(f), 2), y


@torch.no_grad()
def test_what_others_see_stays() -> None:
    found, left = stems(Seen(), 3, 12, 15)
    assert found == [(1, 0, name, "none", 1, 1, 0, True) for name in ("relu", "relu", "relu", "none", "none", "relu")]
    assert {torch.ops.aten.relu.default, torch.ops.aten.avg_pool2d.default} <= left


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(9, 16, 3),
        nn.Conv2d(3, 15, 3),
        nn.Conv2d(3, 16, 1),
        nn.Conv2d(3, 16, 4, 4),  # cuts patches
        nn.Conv2d(3, 16, 3, stride=(1, 2)),
        nn.Conv2d(3, 16, 3, padding=(1, 0)),
        nn.Conv2d(3, 16, 3, dilation=2),
        nn.Conv2d(4, 16, 3, groups=2),
    ],
    ids=str,
)
def test_layers_that_are_no_stem_stay_as_they_are(layer: nn.Conv2d) -> None:
    assert not stems(nn.Sequential(layer), layer.in_channels, 12, 12)[0]


@torch.no_grad()
def test_a_stem_stands_before_other_convolutions_and_takes_images_of_dynamic_size() -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1)).eval()
    captured = capture(model, torch.rand(3, 3, 18, 18), dynamic=SMALL)
    rewritten = rewrite(captured, PASSES)
    assert rewritten.rewrites == ["stem_convolution", "winograd_convolution"]
    x = torch.rand(2, 3, 18, 18)
    torch.testing.assert_close(rewritten.program.module()(x)[0], captured.program.module()(x)[0], rtol=1e-4, atol=1e-5)
    sizes = {"input": {2: DynamicDim("height", 5, 12, 20)}}
    captured = capture(model, x[:, :, :12], dynamic=sizes)
    rewritten, other = rewrite(captured, PASSES), torch.rand(2, 3, 15, 18)
    assert rewritten.rewrites == ["stem_convolution"]
    torch.testing.assert_close(rewritten.program.module()(other)[0], model(other), rtol=1e-4, atol=1e-5)


class Centred(nn.Module):
    """A padded convolution of an image less its mean, of all channels or of each."""

    mean: torch.Tensor

    def __init__(self, *mean: float) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.convolution(2 * x - self.mean)


@torch.no_grad()
def test_one_mean_pads_images_of_any_size() -> None:
    sizes = {"x": {2: DynamicDim("height", 5, 12, 20)}}
    model, x = Centred(1.0).eval(), torch.rand(3, 3, 12, 12)
    rewritten = rewrite(capture(model, x, dynamic=sizes), PASSES)
    assert rewritten.rewrites == ["normalization_into_padding"]
    sample = torch.randn(3, 3, 7, 12)
    torch.testing.assert_close(rewritten.program.module()(sample)[0], model(sample))
    captured = capture(Centred(0.5, 0.45, 0.4).eval(), x, dynamic=sizes)  # a border of each channel's own
    assert rewrite(captured, PASSES) is captured


class Promoted(nn.Module):
    """A pointwise layer of resized maps of two dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        maps = (nn.functional.interpolate(part, size=(12, 12)) for part in (x.half(), x))
        return self.layer(torch.cat(tuple(maps), 1))


def test_maps_that_are_cast_where_they_meet_are_not_moved_behind_a_layer() -> None:
    captured = capture(Promoted().eval(), torch.rand(3, 3, 6, 6), dynamic=SMALL)
    assert rewrite(captured, PASSES) is captured
