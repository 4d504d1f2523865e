"""The generalised mean as a function: the largest value is taken out, so that no power leaves the range of float32.

Plain PyTorch on purpose: torch.compile makes two passes of it.
"""

import torch

from planmill.kernels.common.checks import check_device, check_float, check_rank

SMALL = 0.1  # exponents below it lose digits in log(mean(x^p)) / p


def average_by_power(x: torch.Tensor, p: torch.Tensor, *, eps: float = 1e-6) -> torch.Tensor:
    """Generalised mean over the tokens, one exponent for each group of channels.

        y[b, c] = (mean over n of u^p)^(1/p),    u = max(x[b, n, c], eps),    p = p_g, g = c // (C / G)

    computed as M (mean (u / M)^p)^(1/p) with M the largest u (the smallest where p < 0), in float32. p = 1 is the mean,
    large p nears the maximum, p = -1 is the harmonic mean, p = 0 the geometric one, to which both sides tend.

    Args:
        x: [B, N, C], float16, bfloat16 or float32, any strides; N at least 1. What is below eps counts as eps.
        p: [G], any float dtype, any sign; G divides C. Groups are of neighbouring channels.
        eps: above 0.

    Returns:
        [B, C] of the dtype of x; NaN for a channel that holds NaN or infinity.

    Raises:
        ValueError: wrong rank or shape, G that does not divide C, no tokens, eps not above 0, another device.
        TypeError: x of another dtype.

    Source: GGeM, from its abstract: groups of channels with a shared, learned exponent, on the patch tokens of a ViT.
    Number of groups, first p (3 in the layer) and the clamp (1e-6) are those of generalised-mean pooling elsewhere.
    """
    op = "average_by_power"
    check_rank(op, "x", x, 3, "[B, N, C]")
    check_float(op, "x", x)
    check_rank(op, "p", p, 1, "[G]")
    check_device(op, "p", p, "x", x)
    if p.shape[0] == 0 or x.shape[2] % p.shape[0]:
        raise ValueError(f"{op}: p must have a length that divides the {x.shape[2]} channels, got {p.shape[0]}")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x must have tokens, got {list(x.shape)}")
    if eps <= 0:
        raise ValueError(f"{op}: eps must be above 0, got {eps}")
    power = p.float().repeat_interleave(x.shape[2] // p.shape[0])
    u = x.float().clamp_min(eps)
    bound = torch.where(power < 0, u.detach().amin(1), u.detach().amax(1))  # the result does not depend on it
    logs = (u / bound[:, None]).log()
    exponents = power * logs  # at most 0
    nonzero = torch.where(power == 0, 1.0, power)
    far = exponents.exp().mean(1).log() / nonzero
    near = exponents.expm1().mean(1).log1p() / nonzero
    mean = torch.where(power.abs() < SMALL, near, far)
    return (bound * torch.where(power == 0, logs.mean(1), mean).exp()).to(x.dtype)
