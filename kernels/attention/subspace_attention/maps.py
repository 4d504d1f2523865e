"""Subspace attention as a function of its folded weights: all groups at once, nothing looped, split or joined.

Plain PyTorch on purpose: a chain of a few passes that torch.compile fuses; its share of a network's time is small.
"""

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_device, check_float, check_rank


def attend_in_subspaces(
    x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, w: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """One attention map over the positions for each of g groups of C / g neighbouring channels.

        a = relu(alpha x + beta),    m = 3 x 3 maximum of a (stride 1; what lies outside is left out)
        s_g = relu(sum over the channels of g of w m + delta_g),    P_g = softmax of s_g over the positions
        y = x (1 + P_g)

    All in float32, rounded once: P is about 1 / (H W), and 1 + P rounds to 1 in bfloat16 from 256 positions on, in
    float16 from 2048. With 16-bit results the op is close to the identity except at peaks of a map.

    Args:
        x: [B, C, H, W], float16, bfloat16 or float32, any strides.
        alpha, beta: [C], a depthwise 1 x 1 convolution and its batch norm, folded; any float dtype.
        w: [C], the pointwise convolution of every group, folded.
        delta: [g], its bias, folded; g divides C.

    Returns:
        [B, C, H, W] of the dtype of x. A NaN makes its group of its sample NaN; samples do not depend on each other.

    Raises:
        ValueError: wrong rank or shape, g that does not divide C, another device.
        TypeError: x of another dtype.

    Source: Saini et al., "ULSAM: ultra-lightweight subspace attention module" (WACV 2020), section 3, and its code.
    """
    op = "attend_in_subspaces"
    check_rank(op, "x", x, 4, "[B, C, H, W]")
    check_float(op, "x", x)
    channels, groups = x.shape[1], delta.shape[0] if delta.dim() == 1 else 0
    for name, tensor in (("alpha", alpha), ("beta", beta), ("w", w)):
        if tensor.shape != (channels,):
            raise ValueError(f"{op}: {name} must be [{channels}] for x {list(x.shape)}, got {list(tensor.shape)}")
        check_device(op, name, tensor, "x", x)
    check_device(op, "delta", delta, "x", x)
    if groups == 0 or channels % groups:
        raise ValueError(f"{op}: delta must be [g], g dividing the {channels} channels, got {list(delta.shape)}")
    if x.shape[2] == 0 or x.shape[3] == 0:
        return x * 1
    z = x.float()
    a = torch.addcmul(beta.float()[:, None, None], z, alpha.float()[:, None, None]).relu()
    m = F.max_pool2d(a, 3, stride=1, padding=1)
    s = (m * w.float()[:, None, None]).unflatten(1, (groups, -1)).sum(2) + delta.float()[:, None, None]
    share = s.relu().flatten(2).softmax(2).unflatten(2, s.shape[2:])
    return (z.unflatten(1, (groups, -1)) * (1 + share[:, :, None])).flatten(1, 2).to(x.dtype)
