"""Around the first token where there is a mean to take off: digits of a large one are not lost in float32."""

from typing import Any

import torch

from planmill.kernels.moments.head_covariance.reference import head_covariance_reference


def head_covariance_portable(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int, eps: float, centering: str, *rest: Any
) -> torch.Tensor:
    """See the reference; in float32."""
    if not weight.numel() and centering != "none":
        x = x.float()
        x = x - (x[:, :1] if centering == "channel" else x[:, :1, :1])
    return head_covariance_reference(x, weight, bias, heads, eps, centering, *rest)
