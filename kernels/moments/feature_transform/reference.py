"""y = sign(x) g(|x|), g one of |x|^p, log(1 + |x|), log(1 + 1 / |x|)^-p; g(0) = 0; float64."""

import torch


def feature_transform_reference(x: torch.Tensor, kind: str, exponent: float) -> torch.Tensor:
    """y, shape and dtype of x."""
    a = x.double().abs()
    if kind == "power":
        g = a**exponent
    elif kind == "log":
        g = a.log1p()
    else:
        g = torch.where(a > 0, (1 / a).log1p() ** -exponent, 0.0)
    return (x.double().sign() * torch.where(a == 0, 0.0, g)).to(x.dtype)
