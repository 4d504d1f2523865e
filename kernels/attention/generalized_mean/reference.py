"""y[b, c] = (mean over n of max(x[b, n, c], eps)^p_g)^(1/p_g), g the group of c; p_g = 0: geometric mean; float64."""

import math

import torch


def generalized_mean_reference(x: torch.Tensor, p: torch.Tensor, eps: float) -> torch.Tensor:
    """y [B, C] of the dtype of x, for x [B, N, C] and p [G]."""
    power = p.double().repeat_interleave(x.shape[2] // len(p))
    logs = x.double().clamp_min(eps).log()  # exponents of x^p: no power overflows
    nonzero = torch.where(power == 0, 1, power)
    mean = (torch.logsumexp(nonzero * logs, 1) - math.log(x.shape[1])) / nonzero
    return torch.where(power == 0, logs.mean(1), mean).exp().to(x.dtype)
