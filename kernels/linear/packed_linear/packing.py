"""A weight as packed_linear takes it."""

import torch
from torch.nn import functional as F

PANEL = 16  # output channels that stand together


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """A weight in panels of 16 output channels, in which the channels of the input come one after another.

    Args:
        weight: [N, K], float32, as nn.Linear has it.

    Returns:
        [P, K, 16], float32: output channel n at [n // 16, :, n % 16], zeros beyond N.

    Raises:
        ValueError: another rank.
        TypeError: another dtype.

    Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (ACM TOMS 2008), section 5.
    """
    if weight.dim() != 2:
        raise ValueError(f"pack_weight: weight must be [N, K], got {list(weight.shape)}")
    if weight.dtype != torch.float32:
        raise TypeError(f"pack_weight: weight must be float32, got {weight.dtype}")
    padded = F.pad(weight, (0, 0, 0, -weight.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()
