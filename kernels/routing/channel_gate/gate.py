"""The gate as functions: the mean of a channel, a step of it, and the product.

Plain PyTorch on purpose: three passes over memory that torch.compile fuses with their neighbours. A kernel of its own
would save one read of x and stand in the way of that fusion.
"""

import torch

from planmill.kernels.common.checks import check_device, check_float

LAYOUTS = "[B, C, H, W] or [B, N, C]"


def channels_of(op: str, x: torch.Tensor) -> int:
    """C of `x` [B, C, H, W] or [B, N, C]; raises for any other rank or dtype."""
    if x.dim() not in (3, 4):
        raise ValueError(f"{op}: x must be {LAYOUTS}, got {list(x.shape)}")
    check_float(op, "x", x)
    return x.shape[1 if x.dim() == 4 else 2]


def average_channels(x: torch.Tensor) -> torch.Tensor:
    """Mean of every channel: `s[b, c]` = mean of `x` over the positions of sample b, summed in float32.

    Args:
        x: [B, C, H, W] or [B, N, C], float32, bfloat16 or float16, any strides.

    Returns:
        [B, C] float32; NaN where there are no positions, and where a channel holds NaN.

    Raises:
        ValueError: another rank.
        TypeError: another dtype.

    Source: the squeeze step of Hu, Shen, Sun, "Squeeze-and-Excitation Networks" (CVPR 2018), section 3.1.
    """
    channels_of("average_channels", x)
    return x.mean((2, 3) if x.dim() == 4 else 1, dtype=torch.float32)


def gate_by_mean(x: torch.Tensor, threshold: float = 0.0) -> torch.Tensor:
    """Step gate of every channel: `g[b, c] = 1` where the channel's mean is above `threshold`, otherwise 0.

    The step is discontinuous: a mean within float32 rounding of the threshold may fall on either side of it, and no
    gradient flows through the gate.

    Args:
        x: [B, C, H, W] or [B, N, C], float32, bfloat16 or float16, any strides.
        threshold: in units of x. A mean equal to it gives 0.

    Returns:
        [B, C] float32, 0 or 1. A channel that holds NaN gets 0.

    Raises:
        ValueError: another rank.
        TypeError: another dtype.

    Source: DSAT, the inference form of its channel activation; the published threshold is 0.
    """
    return (average_channels(x) > threshold).float()


def gate_channels(x: torch.Tensor, gate: torch.Tensor, *, base: float = 0.0, slope: float = 1.0) -> torch.Tensor:
    """Each channel times its gate: `y = x * (base + slope * gate)`.

    Args:
        x: [B, C, H, W] or [B, N, C], float32, bfloat16 or float16, any strides.
        gate: [B, C], or [C] for all samples; float32, bfloat16 or float16, on the device of `x`.
        base, slope: the factor of a gate of 0 is `base`, that of a gate of 1 `base + slope`.

    Returns:
        Shape and dtype of `x`; the product is taken in float32 and rounded once. A factor of 0 leaves NaN and infinity
        NaN, as a product does.

    Raises:
        ValueError: another rank, a gate of another shape, tensors on different devices.
        TypeError: another dtype.

    Source: the common form of DSAT (base 1, slope 1), Hydra's gates and Squeeze-and-Excitation (base 0, slope 1).
    """
    op = "gate_channels"
    channels = channels_of(op, x)
    check_float(op, "gate", gate)
    check_device(op, "gate", gate, "x", x)
    if gate.dim() not in (1, 2) or gate.shape[-1] != channels or (gate.dim() == 2 and gate.shape[0] != x.shape[0]):
        raise ValueError(f"{op}: gate must be [{x.shape[0]}, {channels}] or [{channels}], got {list(gate.shape)}")
    factor = base + slope * gate.float()
    if x.dim() == 4:
        factor = factor[..., None, None]
    elif gate.dim() == 2:
        factor = factor[:, None]
    return (x * factor).to(x.dtype)
