"""HI-MHSA: m_j = mean_n x_nj; t = gelu(LN(W m + b)) + pos; X' = [x; t]; cls_out = Wo-row(cls) + mean_j Wo-row(t_j)."""

import torch
from torch.nn import functional as F


def head_token_attention_reference(x: torch.Tensor, weights: dict[str, torch.Tensor], h: int) -> torch.Tensor:
    """y [B, N, C] in float64, nothing folded; `weights` as in DHVT's state dict."""
    x, w = x.double(), {name: value.double() for name, value in weights.items()}
    B, N, C = x.shape
    m = x.view(B, N, h, C // h).mean(1)  # [B, h, d]
    t = (m @ w["ht_proj.weight"].T + w["ht_proj.bias"]).view(B, h, h, C // h)
    t = F.gelu(F.layer_norm(t, (C // h,), w["ht_norm.weight"], w["ht_norm.bias"])).flatten(2) + w["pos_embed"]
    X = torch.cat([x, t], 1)
    qkv = X @ w["qkv.weight"].T + w.get("qkv.bias", 0)
    q, k, v = qkv.view(B, N + h, 3, h, C // h).permute(2, 0, 3, 1, 4)
    a = ((q @ k.mT) * (C // h) ** -0.5).softmax(-1) @ v
    y = a.transpose(1, 2).flatten(2) @ w["proj.weight"].T + w["proj.bias"]
    return torch.cat([y[:, :1] + y[:, N:].mean(1, keepdim=True), y[:, 1:N]], 1)
