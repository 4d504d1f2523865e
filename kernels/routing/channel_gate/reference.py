"""s_c = mean of channel c; g_c = 1 if s_c > theta else 0; y = x (c0 + c1 g); float64."""

import torch


def channel_mean_reference(x: torch.Tensor) -> torch.Tensor:
    """s [B, C] float64 of x [B, C, H, W] or [B, N, C]."""
    return x.double().mean((2, 3) if x.dim() == 4 else 1)


def step_gate_reference(x: torch.Tensor, theta: float) -> torch.Tensor:
    """g [B, C] float64, 0 or 1."""
    return (channel_mean_reference(x) > theta).double()


def channel_gate_reference(x: torch.Tensor, g: torch.Tensor, c0: float, c1: float) -> torch.Tensor:
    """y, shape and dtype of x, for a gate g [C] or [B, C]."""
    factor = (c0 + c1 * g.double()).expand(x.shape[0], -1)
    factor = factor[:, :, None, None] if x.dim() == 4 else factor[:, None, :]
    return (x.double() * factor).to(x.dtype)
