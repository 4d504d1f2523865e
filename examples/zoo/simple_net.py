"""SimpleNet (Liu et al., CVPR 2023, arXiv 2303.15140): the head on the features of a backbone.

Inference only, with the layer names of DonaldRR/SimpleNet, so that its checkpoints load (`load_checkpoint`). The
published code unfolds 3 x 3 patches and pools each of them to 1536 numbers twice; that is one fixed stencil, computed
here as a grouped convolution at each layer's own size.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F


class Detection(NamedTuple):
    """What the head gives: scores [B] and maps [B, H, W]; higher means more anomalous."""

    score: torch.Tensor
    anomaly_map: torch.Tensor


class Stencil(nn.Module):
    """Means of `count` consecutive numbers of every 3 x 3 patch, ordered (channel, row, column), zeros outside.

    Features [B, C, h, w] -> [B, 9 C / count, h, w]. After lcm(count, 9) numbers the pattern repeats, so it is a
    convolution with fixed weights in groups of that period.
    """

    weight: torch.Tensor

    def __init__(self, channels: int, count: int) -> None:
        super().__init__()
        period = math.lcm(count, 9)
        if count < 1 or channels * 9 % period:
            raise ValueError(f"Stencil: {channels} channels of 3 x 3 do not split into periods of {period} numbers")
        self.groups = channels * 9 // period
        one = torch.eye(period // count).repeat_interleave(count, dim=1) / count
        self.register_buffer("weight", one.view(-1, period // 9, 3, 3).repeat(self.groups, 1, 1, 1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return F.conv2d(x, self.weight, padding=1, groups=self.groups)


class Projection(nn.Module):
    """The feature adapter: rows [P, C] -> [P, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential()
        self.layers.add_module("0fc", nn.Linear(width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.layers(x)


class Discriminator(nn.Module):
    """Rows [P, C] -> [P, 1], positive for normal patches."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.body = nn.Sequential()
        block = nn.Sequential(nn.Linear(width, hidden), nn.BatchNorm1d(hidden), nn.LeakyReLU(0.2))
        self.body.add_module("block1", block)
        self.tail = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return self.tail(self.body(x))


class SimpleNetHead(nn.Module):
    """SimpleNet on features: layer2 [B, C2, h, w], layer3 [B, C3, h3, w3] -> `Detection`.

    Patches of both layers as `width` numbers, layer3 resized to layer2's grid; adapter and discriminator per patch; the
    score of a patch is minus the discriminator, that of an image the largest of its patches. The map is resized to the
    image and blurred (deviation 4 pixels).

    Args:
        channels: (C2, C3); WideResNet-50-2 has (512, 1024).
        width: numbers per patch, both layers together; layer l gives the means of 18 C_l / width consecutive ones.
        hidden: of the discriminator.
        grid: (h, w) of layer2.
        image_size: (H, W) of the map.

    Raises:
        ValueError: channels that the width does not divide as the stencil needs.
    """

    rows: torch.Tensor
    columns: torch.Tensor

    def __init__(
        self,
        channels: tuple[int, int] = (512, 1024),
        width: int = 1536,
        hidden: int = 1024,
        grid: tuple[int, int] = (36, 36),
        image_size: tuple[int, int] = (288, 288),
    ) -> None:
        super().__init__()
        for c in channels:
            if 18 * c % width:
                raise ValueError(f"SimpleNetHead: width {width} must divide 18 times the channels, got {c}")
        self.stencil2, self.stencil3 = (Stencil(c, 18 * c // width) for c in channels)
        self.pre_projection = Projection(width)
        self.discriminator = Discriminator(width, hidden)
        self.register_buffer("rows", resize_and_blur(grid[0], image_size[0]), persistent=False)
        self.register_buffer("columns", resize_and_blur(grid[1], image_size[1]), persistent=False)

    def forward(self, layer2: torch.Tensor, layer3: torch.Tensor) -> Detection:
        """See the class."""
        b, _, h, w = layer2.shape
        deep = F.interpolate(self.stencil3(layer3), size=(h, w), mode="bilinear")
        patches = torch.cat([self.stencil2(layer2), deep], dim=1).permute(0, 2, 3, 1).reshape(b * h * w, -1)
        scores = -self.discriminator(self.pre_projection(patches)).view(b, h, w)
        return Detection(scores.amax((1, 2)), self.rows @ scores @ self.columns.transpose(0, 1))


def resize_and_blur(size: int, target: int, deviation: float = 4.0) -> torch.Tensor:
    """One axis of bilinear resizing, then a Gaussian blur: the matrix [target, size], float32.

    The blur is scipy's gaussian_filter: cut off at 4 deviations, the picture mirrored at its border (edge repeated).
    """
    eye = torch.eye(size, dtype=torch.float64)[None, None]
    resize = F.interpolate(eye, size=(target, size), mode="bilinear")[0, 0]
    radius = int(4 * deviation + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    taps = torch.exp(-0.5 * (offsets / deviation).double() ** 2)
    sources = (torch.arange(target)[:, None] + offsets) % (2 * target)
    sources = torch.where(sources < target, sources, 2 * target - 1 - sources)
    blur = torch.zeros(target, target, dtype=torch.float64)
    blur.scatter_add_(1, sources, (taps / taps.sum()).expand(target, -1).contiguous())
    return (blur @ resize).float()


def wide_resnet50() -> SimpleNetHead:
    """The head of the paper: WideResNet-50-2 at 288 x 288, in eval mode."""
    return SimpleNetHead().eval()


def load_checkpoint(head: SimpleNetHead, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Fill a head from a checkpoint of DonaldRR/SimpleNet.

    Args:
        head: changed in place.
        state: state dicts "discriminator" and "pre_projection".

    Raises:
        ValueError: one of the two is missing.
        RuntimeError: their names or shapes are not the head's.
    """
    for name in ("pre_projection", "discriminator"):
        if name not in state:
            raise ValueError(f"load_checkpoint: the checkpoint holds no {name!r}, but {', '.join(state) or 'nothing'}")
        head.get_submodule(name).load_state_dict(state[name])
