"""F = (Z * K) Z; gate: sigmoid(s_c s_hw) Z with s = m^2 K of means m; local: DW_{K_b} Z_b; float64."""

import torch


def global_reference(z: torch.Tensor, kernel: torch.Tensor, twice: bool) -> torch.Tensor:
    """F [B, C, S, S] of z [B, C, S, S] and kernel [C, S, S]."""
    Z, K = z.double(), kernel.double()
    left = Z * K if twice else K.expand(Z.shape)
    return torch.einsum("bcik,bckj->bcij", left, Z).to(z.dtype)


def gate_reference(z: torch.Tensor, channel_kernel: torch.Tensor, position_kernel: torch.Tensor) -> torch.Tensor:
    """z [B, C, H, W] times sigmoid(s_c s_hw); kernels [C] and [H, W]."""
    Z = z.double()
    channel = Z.mean((2, 3)) ** 2 * channel_kernel.double()  # (m * K) * m
    position = Z.mean(1) ** 2 * position_kernel.double()
    return (Z * torch.sigmoid(channel[:, :, None, None] * position[:, None])).to(z.dtype)


def filter_reference(z: torch.Tensor, kernels: torch.Tensor) -> torch.Tensor:
    """Depthwise [B, C, H, W], zero borders, with kernels [B, C, k, k] of each sample."""
    k, (height, width) = kernels.shape[2], z.shape[2:]
    padded = torch.nn.functional.pad(z.double(), (k // 2,) * 4)
    windows = padded.unfold(2, k, 1).unfold(3, k, 1)[:, :, :height, :width]
    return torch.einsum("bchwij,bcij->bchw", windows, kernels.double()).to(z.dtype)
