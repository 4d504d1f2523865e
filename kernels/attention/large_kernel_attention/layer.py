"""LargeKernelAttention and GatedLargeKernel: the two modules of VAN around the op."""

from collections.abc import Mapping

import torch
from torch import nn

from planmill.kernels.attention.large_kernel_attention.op import attend_with_large_kernel


class LargeKernelAttention(nn.Module):
    """`attend_with_large_kernel` with its weights: `y = x * conv1(conv_spatial(conv0(x)))`.

    Parameters are named as in VAN (`conv0`, `conv_spatial`, `conv1`): its checkpoints load as they are.

    Args:
        dim: C.

    Shapes: x [B, C, H, W] -> the same.

    Source: Guo et al., "Visual attention network" (CVM 2023), section 3.1.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    @classmethod
    def from_van(cls, source: nn.Module | Mapping[str, torch.Tensor]) -> "LargeKernelAttention":
        """The layer with the weights of VAN's module of the same kind, or of its state dict."""
        state = _read(source, "LargeKernelAttention", "conv0.weight")
        with torch.device("meta"):
            layer = cls(state["conv0.weight"].shape[0])
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within `x`."""
        convolutions = (self.conv0, self.conv_spatial, self.conv1)
        return attend_with_large_kernel(x, *(p for convolution in convolutions for p in convolution.parameters()))


class GatedLargeKernel(nn.Module):
    """VAN's spatial attention: `proj_2(spatial_gating_unit(gelu(proj_1(x)))) + x`, projections 1 x 1.

    Parameters are named as in VAN. The shortcut adds the module's own input, which in VAN is what its norm gives.

    Args:
        dim: C.

    Shapes: x [B, C, H, W] -> the same.

    Source: Guo et al., "Visual attention network" (CVM 2023), figure 3, and its code: the exact GELU.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1 = nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = LargeKernelAttention(dim)
        self.proj_2 = nn.Conv2d(dim, dim, 1)

    @classmethod
    def from_van(cls, source: nn.Module | Mapping[str, torch.Tensor]) -> "GatedLargeKernel":
        """The layer with the weights of VAN's module of the same kind, or of its state dict."""
        state = _read(source, "GatedLargeKernel", "proj_1.weight")
        with torch.device("meta"):
            layer = cls(state["proj_1.weight"].shape[0])
        layer.load_state_dict(state, assign=True)
        return layer.requires_grad_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend within `x`."""
        if x.dim() != 4 or x.shape[1] != self.proj_1.in_channels:
            raise ValueError(f"GatedLargeKernel: x must be [B, {self.proj_1.in_channels}, H, W], got {list(x.shape)}")
        return self.proj_2(self.spatial_gating_unit(nn.functional.gelu(self.proj_1(x)))) + x


def _read(source: nn.Module | Mapping[str, torch.Tensor], layer: str, needed: str) -> dict[str, torch.Tensor]:
    state = {k: v.detach() for k, v in (source.state_dict() if isinstance(source, nn.Module) else source).items()}
    if needed not in state:
        raise ValueError(f"{layer}.from_van: the weights must hold {needed}, got {', '.join(state) or 'none'}")
    return state
