"""h_t = exp(dl_t A) h_{t-1} + dl_t B_t u_t, y_t = (<C_t, h_t> + D u_t) silu(z_t); step by step, float64."""

import torch
from torch.nn import functional as F


def selective_scan_reference(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor, z: torch.Tensor, delta_bias: torch.Tensor, delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y, dtype of u, and h_L [B, Di, Ns] float32, of u, delta, z [B, Di, L], A [Di, Ns], B, C [B, G, Ns, L]."""
    x, dl, A = u.double(), delta.double(), A.double()
    dl = dl + delta_bias.double()[:, None] if delta_bias.numel() else dl
    dl = F.softplus(dl) if delta_softplus else dl
    channels = u.shape[1] // B.shape[1]  # of a group
    Bs, Cs = (t.double().repeat_interleave(channels, 1) for t in (B, C))  # [B, Di, Ns, L]
    h, rows = x.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(dl[..., t, None] * A) * h + dl[..., t, None] * Bs[..., t] * x[..., t, None]
        rows.append((h * Cs[..., t]).sum(2))
    y = torch.stack(rows, 2) if rows else x
    y = y + D.double()[:, None] * x if D.numel() else y
    y = y * F.silu(z.double()) if z.numel() else y
    return y.to(u.dtype), h.float()
