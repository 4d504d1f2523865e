"""GroupedPowerMean: `average_by_power` with learned exponents."""

import torch
from torch import nn

from planmill.kernels.attention.generalized_mean.pooling import average_by_power


class GroupedPowerMean(nn.Module):
    """Generalised-mean pooling of tokens or of an image, one learned exponent `p` for each group of channels.

    Args:
        channels: C.
        groups: G; a ViT's number of heads, as the paper has it. 1: GeM.
        p: of every group at first.
        eps: what lies below counts as it.

    Shapes: x [B, N, C] or [B, C, H, W] -> [B, C].

    Source: see `average_by_power`.
    """

    def __init__(self, channels: int, groups: int = 1, *, p: float = 3.0, eps: float = 1e-6) -> None:
        super().__init__()
        if groups < 1 or channels % groups:
            raise ValueError(f"GroupedPowerMean: groups must divide the {channels} channels, got {groups}")
        self.p, self.eps = nn.Parameter(torch.full((groups,), p)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool `x`."""
        return average_by_power(x.flatten(2).transpose(1, 2) if x.dim() == 4 else x, self.p, eps=self.eps)

    def extra_repr(self) -> str:
        """The settings."""
        return f"groups={len(self.p)}, eps={self.eps}"
