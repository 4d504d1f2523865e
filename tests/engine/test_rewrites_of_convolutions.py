"""Rewrites that change how a convolution is computed: by Winograd's algorithm, and on an image padded with its mean."""

import torch
from torch import nn

from planmill.engine import DynamicDim, capture
from planmill.engine.rewrites import PASSES, rewrite

SMALL = DynamicDim("batch", 1, 3, 4)
OP = torch.ops.planmill.winograd_convolution.default


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
