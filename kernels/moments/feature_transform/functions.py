"""Transforms that even out the channels of frozen features; PyTorch's own element-wise operators compute them well."""

import torch

from planmill.kernels.common.checks import check_float

KINDS = ("power", "log", "importance")


def transform_features(x: torch.Tensor, kind: str = "power", *, exponent: float | None = None) -> torch.Tensor:
    """Features with large channels pulled in: y = sign(x) g(|x|).

    "power": g = |x|^p, as Tukey's ladder for p below 1; "log": g = log(1 + |x|); "importance": g = log(1 + 1 / |x|)^-p.
    Zero stays zero. Such training-free transforms before nearest prototypes are what FeTT does; its own formulas and
    exponents were not verified, and none of these is claimed to be them.

    Args:
        x: any shape, float32, bfloat16 or float16.
        kind: "power", "log" or "importance".
        exponent: p, above 0; None: 0.5 for "power" and 1.3 for "importance". "log" has none.

    Returns:
        Shape and dtype of `x`, computed in float32: 1 / |x| of a small 16-bit number is in range.

    Raises:
        ValueError: an unknown kind, an exponent that is not above 0, or one for "log".
        TypeError: another dtype.

    Source: Tukey, "Exploratory data analysis" (1977); Luo, Xu, Xu, "Channel importance matters in few-shot image
        classification" (ICML 2022), from memory.
    """
    op = "transform_features"
    check_float(op, "x", x)
    if kind not in KINDS:
        raise ValueError(f"{op}: kind must be one of {', '.join(KINDS)}, got {kind!r}")
    if exponent is not None and (kind == "log" or not exponent > 0):
        raise ValueError(f"{op}: exponent must be above 0, and is none of log's, got {exponent} with kind {kind!r}")
    a = x.float().abs()
    if kind == "log":
        g = a.log1p()
    elif kind == "power":
        g = a.pow(0.5 if exponent is None else exponent)
    else:
        # log(1 + 1 / a) = log(1 + a) - log(a) where 1 / a would leave the range
        inverse = torch.where(a > 1e-6, a.clamp_min(1e-6).reciprocal().log1p(), -a.clamp_min(1e-45).log())
        g = torch.where(a == 0, 0.0, inverse.pow(-1.3 if exponent is None else -exponent))
    return torch.copysign(g, x.float()).to(x.dtype)
