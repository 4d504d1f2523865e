"""y = u * (W (DW7 (DW5 u + b5) + b7) + b): 5 x 5, 7 x 7 with dilation 3, 1 x 1; zero borders for each; float64."""

import torch
from torch.nn import functional as F


def large_kernel_attention_reference(
    x: torch.Tensor, weight5: torch.Tensor, bias5: torch.Tensor, weight7: torch.Tensor, bias7: torch.Tensor,
    weight_point: torch.Tensor, bias_point: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """y [B, C, H, W] of the dtype of x."""
    u = x.double().contiguous()
    if u.numel() == 0:
        return torch.empty_like(x, memory_format=torch.contiguous_format) + 0 * (weight5.sum() + weight7.sum())
    channels = u.shape[1]
    t = F.conv2d(u, weight5.double(), bias5.double(), padding=2, groups=channels)
    t = F.conv2d(t, weight7.double(), bias7.double(), padding=9, dilation=3, groups=channels)
    return (u * F.conv2d(t, weight_point.double(), bias_point.double())).to(x.dtype)
