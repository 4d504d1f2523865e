"""How far a result of linear_attention may be off: in units of what was summed, which may cancel in the result."""

import torch

from planmill.kernels.attention.linear_attention.reference import apply_map, linear_attention_reference


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Raise unless |got - o| <= atol * (sum |weights| |v| + |o| sum |weights|) / |total| + rtol |o|."""
    q, k, v, mask, feature_map, normalize, causal, scale, eps = args
    f, g = (apply_map(x.double(), feature_map) for x in (q, k))

    def summed(f: torch.Tensor, g: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return linear_attention_reference(f, g, v, mask, "identity", False, causal, abs(scale), eps)

    spread = summed(f.abs(), g.abs(), v.double().abs())
    if normalize:
        ones = torch.ones_like(v[..., :1], dtype=torch.float64)
        weights = summed(f.abs(), g.abs(), ones)
        spread = (spread + want[0].double().abs() * weights) / (summed(f, g, ones) + eps).abs()
    found, right = got[0].double(), want[0].double()
    bound = atol * spread + rtol * right.abs() + 1e-30
    off = (found - right).abs()
    wrong = ~((off <= bound) | (found.isnan() & right.isnan()) | (found == right))
    if wrong.any():
        worst = (off / bound).nan_to_num(torch.inf).masked_fill(~wrong, 0).flatten().argmax()
        raise AssertionError(
            f"{int(wrong.sum())} of {wrong.numel()} are off, the worst by {off.flatten()[worst]:.3g} of "
            f"{bound.flatten()[worst]:.3g}: {found.flatten()[worst]:.6g} where {right.flatten()[worst]:.6g} is right"
        )
