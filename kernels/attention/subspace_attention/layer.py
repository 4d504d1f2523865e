"""SubspaceAttention: ULSAM's module, with its convolutions and norms folded at inference."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.subspace_attention.maps import attend_in_subspaces


class Subspace(nn.Module):
    """The weights of one group of channels, named as in ULSAM's code, and its form in training."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_dws = nn.Conv2d(channels, channels, 1, groups=channels)
        self.bn_dws = nn.BatchNorm2d(channels, momentum=0.9)
        self.conv_point = nn.Conv2d(channels, 1, 1)
        self.bn_point = nn.BatchNorm2d(1, momentum=0.9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The published chain, for training: batch norms take the statistics of the batch."""
        m = F.max_pool2d(self.bn_dws(self.conv_dws(x)).relu(), 3, stride=1, padding=1)
        s = self.bn_point(self.conv_point(m)).relu()
        return x + x * s.flatten(2).softmax(2).view(s.shape)

    def folded(self) -> tuple[torch.Tensor, ...]:
        """alpha, beta, w and delta of the group."""
        return *_fold(self.conv_dws, self.bn_dws), *_fold(self.conv_point, self.bn_point)


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[torch.Tensor, torch.Tensor]:
    bias, mean, variance = convolution.bias, norm.running_mean, norm.running_var
    if bias is None or mean is None or variance is None:
        raise ValueError("SubspaceAttention: convolutions must have biases and norms running statistics")
    factor = norm.weight.float() * (variance.float() + norm.eps).rsqrt()
    return convolution.weight.float().flatten() * factor, (bias.float() - mean.float()) * factor + norm.bias.float()


class SubspaceAttention(nn.Module):
    """ULSAM: `y = x (1 + P_g)`, one map P_g over the positions for each group of channels; see `attend_in_subspaces`.

    At inference convolutions and batch norms are folded into four vectors, in float32, and all groups are computed at
    once; in training the published chain runs, and samples depend on each other through the norms.

    Args:
        channels: C.
        groups: g, a divisor of C.

    Shapes: x [B, C, H, W] -> the same.

    Source: Saini et al., "ULSAM" (WACV 2020). Parameters are named as in its code: its checkpoints load as they are.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"SubspaceAttention: groups must divide the {channels} channels, got {groups}")
        self.channels = channels
        self.subspaces = nn.ModuleList([Subspace(channels // groups) for _ in range(groups)])

    @classmethod
    def from_ulsam(cls, source: nn.Module | Mapping[str, torch.Tensor]) -> "SubspaceAttention":
        """The layer with the weights of ULSAM's module, or of its state dict; in evaluation mode."""
        state = dict(source.state_dict() if isinstance(source, nn.Module) else source)
        biases = [v for k, v in state.items() if k.endswith("conv_dws.bias")]
        if not biases:
            raise ValueError(
                f"SubspaceAttention.from_ulsam: the weights must hold subspaces.0.conv_dws.bias, got {', '.join(state)}"
            )
        layer = cls(sum(len(bias) for bias in biases), len(biases))
        layer.load_state_dict(state)
        return layer.eval()

    def _folded(self) -> tuple[torch.Tensor, ...]:
        """alpha, beta, w [C] and delta [g]."""
        parts = [cast(Subspace, subspace).folded() for subspace in self.subspaces]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within `x`."""
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"SubspaceAttention: x must be [B, {self.channels}, H, W], got {list(x.shape)}")
        if not self.training:
            return attend_in_subspaces(x, *self._folded())
        chunks = x.chunk(len(self.subspaces), 1)
        return torch.cat([subspace(part) for subspace, part in zip(self.subspaces, chunks, strict=True)], 1)
