"""ConvolutionalFeedForward: DHVT's DAFF, a feed-forward layer with a depthwise convolution and a gated class token."""

import math

import torch
from torch import nn
from torch.nn import functional as F


def normalised(weight: torch.Tensor, bias: torch.Tensor, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight [O, ...] and bias of a convolution followed by `norm` in inference, as one convolution."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), (bias - norm.running_mean) * scale + norm.bias


class ConvolutionalFeedForward(nn.Module):
    """Patches go through 1 x 1, depthwise 3 x 3 and 1 x 1 convolutions; the class token is scaled by their mean.

        u = gelu(BN(W1 x));  z = BN(W3 (u + gelu(BN(depthwise u))))          patches, as an image of `grid`
        cls_out = cls * (We gelu(Wc mean of z))                              no sigmoid, as published

    Names of the weights are those of DHVT's `DAFF`: `conv1`, `conv2`, `conv3`, `bn1`, `bn2`, `bn3`, `compress`,
    `excitation`. In inference each norm is folded into its convolution, and the 1 x 1 convolutions run on the tokens as
    they lie. In training the norms use the batch, as any BatchNorm does: only then samples depend on each other.

    Args:
        dim: C, a multiple of 4.
        hidden: of the convolutions; None: 4 C.

    Shapes: x [B, 1 + N, C], the class token first -> the same. `grid` (height, width) of the patches; None: a square,
    which N must then be.

    Source: Lu et al., DHVT (NeurIPS 2022), section 3.2, and its public code.
    """

    def __init__(self, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = 4 * dim if hidden is None else hidden
        self.conv1 = nn.Conv2d(dim, hidden, 1)
        self.conv2 = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.conv3 = nn.Conv2d(hidden, dim, 1)
        self.bn1, self.bn2, self.bn3 = nn.BatchNorm2d(hidden), nn.BatchNorm2d(hidden), nn.BatchNorm2d(dim)
        self.compress = nn.Linear(dim, dim // 4)
        self.excitation = nn.Linear(dim // 4, dim)

    def forward(self, x: torch.Tensor, grid: tuple[int, int] | None = None) -> torch.Tensor:
        """The next tokens."""
        if x.dim() != 3 or x.shape[2] != self.conv1.in_channels or x.shape[1] == 0:
            raise ValueError(
                f"ConvolutionalFeedForward: x must be [B, 1 + N, {self.conv1.in_channels}], got {list(x.shape)}"
            )
        count = x.shape[1] - 1
        height, width = (math.isqrt(count),) * 2 if grid is None else grid
        if height * width != count:
            needed = "a square, or grid given" if grid is None else f"{height} x {width}"
            raise ValueError(f"ConvolutionalFeedForward: x must hold 1 + N tokens, N {needed}, got {list(x.shape)}")
        z = self._mix(x[:, 1:], height, width) if not self.training else self._train(x[:, 1:], height, width)
        gate = self.excitation(F.gelu(self.compress(z.mean(1))))
        return torch.cat([x[:, :1] * gate[:, None], z], 1)

    def _mix(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        weight, bias = normalised(self.conv1.weight, self.conv1.bias, self.bn1)  # type: ignore[arg-type]
        u = F.gelu(F.linear(patches, weight.flatten(1), bias))
        weight, bias = normalised(self.conv2.weight, self.conv2.bias, self.bn2)  # type: ignore[arg-type]
        image = u.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        near = F.conv2d(image, weight, bias, padding=1, groups=len(weight)).permute(0, 2, 3, 1).flatten(1, 2)
        weight, bias = normalised(self.conv3.weight, self.conv3.bias, self.bn3)  # type: ignore[arg-type]
        return F.linear(u + F.gelu(near), weight.flatten(1), bias)

    def _train(self, patches: torch.Tensor, height: int, width: int) -> torch.Tensor:
        image = patches.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        u = F.gelu(self.bn1(self.conv1(image)))
        return self.bn3(self.conv3(u + F.gelu(self.bn2(self.conv2(u))))).flatten(2).transpose(1, 2)
