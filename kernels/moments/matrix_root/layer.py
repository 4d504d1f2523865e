"""Whitening and covariance pooling as layers."""

import torch
from torch import nn

from planmill.kernels.common.checks import check_choice
from planmill.kernels.moments.matrix_root.op import MODES, check_maps, pool_covariance, whiten


class InstanceWhitening(nn.Module):
    """Each image's channels, in groups, centred and whitened over its positions; then an affine, if asked for.

    Args:
        channels: C.
        groups: the channels are whitened in this many groups of C / groups neighbours.
        eps, iterations, mode: see `whiten`.
        affine: learn a factor and a shift per channel, `weight` and `bias` [C].

    Shapes: x [B, C, H, W] or [B, C, HW] -> the same, dtype of x. Images of a batch do not depend on each other.

    Source: see `whiten`.
    """

    def __init__(
        self, channels: int, *, groups: int = 1, eps: float = 1e-5, iterations: int = 5, mode: str = "newton",
        affine: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        op = "InstanceWhitening"
        if groups < 1 or channels % groups:
            raise ValueError(f"{op}: channels must be a multiple of groups, got {channels} and {groups}")
        check_choice(op, "mode", mode, MODES)
        self.channels, self.groups, self.eps, self.iterations, self.mode = channels, groups, eps, iterations, mode
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Whiten `x`."""
        check_maps("InstanceWhitening", x)
        if x.shape[1] != self.channels:
            raise ValueError(f"InstanceWhitening: x must have {self.channels} channels, got {list(x.shape)}")
        grouped = x.reshape(x.shape[0] * self.groups, self.channels // self.groups, -1)
        y = whiten(grouped, eps=self.eps, iterations=self.iterations, mode=self.mode).view(*x.shape[:2], -1)
        if self.weight is not None and self.bias is not None:
            y = torch.addcmul(self.bias[:, None].to(y.dtype), y, self.weight[:, None].to(y.dtype))
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """The settings."""
        return f"{self.channels}, groups={self.groups}, iterations={self.iterations}, mode={self.mode!r}"


class CovariancePooling(nn.Module):
    """iSQRT-COV, the pooling of fast-MPN-COV: features to 256 channels, then the root of their covariance.

    Args:
        channels: of the feature maps.
        width: D of the covariance; None takes the maps as they are.
        iterations: see `matrix_sqrt`.

    Its parameters are named as in fast-MPN-COV's `MPNCOV`, `conv_dr_block` with a 1 x 1 convolution without bias and a
    batch normalisation, so that its state dict loads.

    Shapes: x [B, channels, H, W] -> [B, D (D + 1) / 2] float32.

    Source: see `pool_covariance`.
    """

    def __init__(self, channels: int, width: int | None = 256, *, iterations: int = 5) -> None:
        super().__init__()
        self.iterations = iterations
        self.conv_dr_block = (
            None
            if width is None
            else nn.Sequential(nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool `x`."""
        maps = x if self.conv_dr_block is None else self.conv_dr_block(x)
        return pool_covariance(maps, iterations=self.iterations)
