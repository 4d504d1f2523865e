"""Around the first token where there is a mean to take off: digits of a large one are not lost in float32.

The squares of a column's length leave float32 long before the covariances do, so each is divided by its largest first.
Covariances are sums of T products: tokens must stay below 1.8e19 / sqrt(T), where those leave it too.
"""

import torch

from planmill.kernels.moments.head_covariance.reference import head_covariance_reference

_TINY = 1.2e-38  # the smallest normal float32


def head_covariance_portable(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, heads: int, eps: float, centering: str, pairing: str,
    interleaved: bool, normalize: bool,
) -> torch.Tensor:  # fmt: skip
    """See the reference; in float32."""
    if not weight.numel() and centering != "none":
        x = x.float()
        x = x - (x[:, :1] if centering == "channel" else x[:, :1, :1])
    c = head_covariance_reference(x, weight, bias, heads, eps, centering, pairing, interleaved, False)
    if not normalize:
        return c
    largest = c.abs().amax(2, keepdim=True).clamp_min(_TINY)
    c = c / largest
    return c / torch.maximum(c.norm(dim=2, keepdim=True), 1e-12 / largest)
