"""A kernel as stem_convolution takes it."""

import torch
from torch.nn import functional as F

PANEL = 16  # output channels that stand together


def pack_kernel(weight: torch.Tensor) -> torch.Tensor:
    """A convolution's weight in panels of 16 output channels, whose taps come one after another.

    Args:
        weight: [K, C, r, s], as nn.Conv2d has it; any float dtype.

    Returns:
        [P, C, r, s, 16], float32: output channel k at [k // 16, ..., k % 16], zeros beyond K.

    Raises:
        ValueError: another rank.

    Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (ACM TOMS 2008), section 5.
    """
    if weight.dim() != 4:
        raise ValueError(f"pack_kernel: weight must be [K, C, r, s], got {list(weight.shape)}")
    padded = F.pad(weight.float(), (0, 0, 0, 0, 0, 0, 0, -weight.shape[0] % PANEL))
    return padded.unflatten(0, (-1, PANEL)).permute(0, 2, 3, 4, 1).contiguous()


def unpack_kernel(packed: torch.Tensor, outputs: int) -> torch.Tensor:
    """[K, C, r, s] out of its panels."""
    return packed.permute(0, 4, 1, 2, 3).flatten(0, 1)[:outputs]
