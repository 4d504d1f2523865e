"""a = relu(alpha x + beta), m = 3x3 maximum of a, s_g = relu(w_g . m_g + delta_g), y = x (1 + softmax s_g); float64."""

import torch
from torch.nn import functional as F


def subspace_attention_reference(
    x: torch.Tensor, alpha: torch.Tensor, beta: torch.Tensor, w: torch.Tensor, delta: torch.Tensor
) -> torch.Tensor:
    """y [B, C, H, W] of the dtype of x; alpha, beta, w [C], delta [g]."""
    batch, channels, height, width = x.shape
    a = (alpha.double()[:, None, None] * x.double() + beta.double()[:, None, None]).relu()
    m = F.max_pool2d(a, 3, stride=1, padding=1) * w.double()[:, None, None]
    groups = m.view(batch, len(delta), channels // len(delta), height * width)
    s = (groups.sum(2) + delta.double()[:, None]).relu()
    P = s.softmax(2)[:, :, None]
    return (x.double().reshape(groups.shape) * (1 + P)).view(x.shape).to(x.dtype)
