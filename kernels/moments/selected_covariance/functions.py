"""The whitening penalty of AIAW: only the covariances that it counts are computed."""

import torch

from planmill.kernels.common.checks import check_float


def penalize_covariances(x: torch.Tensor, pairs: torch.Tensor, *, margin: float = 0.0) -> torch.Tensor:
    """How much chosen pairs of channels vary together: the loss of adaptive instance whitening.

    mean over b of max(0, (sum over (i, j) of |C_b[i, j]| - margin) / m) with C_b = X_b X_b^T / (HW - 1): no mean is
    taken off, as published. The published code computes all C^2 entries and masks all but a few hundred; here m are.

    Args:
        x: [B, C, H, W] or [B, C, HW] with two positions at least, float32, bfloat16 or float16, any strides.
        pairs: [m, 2] int32 or int64, channels i and j of each entry; i = j is allowed, without the published eps.
        margin: that the sum may reach for nothing.

    Returns:
        [] float32, computed in float32. 0 where there are no images or no pairs.

    Raises:
        ValueError: wrong rank or shape, fewer than two positions, another device.
        TypeError: another dtype.

    Source: Zhou et al., "Instance-aware domain generalization for face anti-spoofing" (CVPR 2023), section 3.2.
    """
    op = "penalize_covariances"
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be [B, C, H, W] or [B, C, HW], got {list(x.shape)}")
    check_float(op, "x", x)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        raise ValueError(f"{op}: pairs must be [m, 2], got {list(pairs.shape)}")
    if pairs.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{op}: pairs must be int32 or int64, got {pairs.dtype}")
    if pairs.device != x.device:
        raise ValueError(f"{op}: pairs must be on {x.device} like x, got {pairs.device}")
    maps = x.flatten(2)
    if maps.shape[2] < 2:
        raise ValueError(f"{op}: x must have two positions at least, got {list(x.shape)}")
    left, right = (maps.index_select(1, pairs[:, side]).float() for side in (0, 1))
    sums = (left * right).sum(2).abs().sum(1) / (maps.shape[2] - 1)
    return ((sums - margin) / max(pairs.shape[0], 1)).clamp_min(0).sum() / max(x.shape[0], 1)
