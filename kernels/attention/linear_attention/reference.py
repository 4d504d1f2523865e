"""o_n = r_n M / (r_n . z + eps), M = sum_m phi(k_m) v_m^T, z = sum_m phi(k_m), r_n = scale phi(q_n); float64."""

import torch

FEATURE_MAPS = ("elu", "relu", "squared_relu", "identity")
CHUNK = 64  # tokens of a causal chunk: within it scores, before it the state


def apply_map(x: torch.Tensor, feature_map: str) -> torch.Tensor:
    """phi."""
    if feature_map == "elu":
        return torch.where(x > 0, x + 1, x.clamp_max(0).exp())
    if feature_map == "relu":
        return x.clamp_min(0)
    return x.clamp_min(0).square() if feature_map == "squared_relu" else x


def linear_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, feature_map: str, normalize: bool,
    causal: bool, scale: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    """o [B, H, N, dv] of the dtype of q."""
    r, f = scale * apply_map(q.double(), feature_map), apply_map(k.double(), feature_map)
    values = torch.cat((v.double(), torch.ones_like(v[..., :1], dtype=torch.float64)), -1)  # [M | z] = f^T [v | 1]
    if mask.numel():
        f = torch.where(mask[:, None, :, None], f, 0)
        values = torch.where(mask[:, None, :, None], values, 0)  # what padding holds does not matter, NaN included
    if causal:
        parts, state = [], torch.zeros_like(f[..., :0, :].mT @ values[..., :0, :])
        for a, b, c in zip(r.split(CHUNK, 2), f.split(CHUNK, 2), values.split(CHUNK, 2), strict=True):
            seen = (c - c).cumsum(
                2
            )  # NaN from the first value on that is not finite: zero times it is NaN, before it too
            parts.append((a @ b.mT).tril() @ c.nan_to_num(0, 0, 0) + seen + a @ state)
            state = state + b.mT @ c
        o = torch.cat(parts, 2)
    else:
        o = r @ (f.mT @ values)
    total = o[..., -1:] + eps if normalize else 1
    return (o[..., :-1] / total).to(q.dtype)
