"""h_t = exp(dl_t A) h_{t-1} + dl_t B_t u_t, y_t = <C_t, h_t> + D u_t; s_t = Wa s_{t-1} + c_t. Step by step, float64."""

import torch
from torch.nn import functional as F


def selective_scan_reference(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None = None, z: torch.Tensor | None = None, delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y [B, Di, L] and h_L [B, Di, Ns], float64, of u, delta, z [B, Di, L], A [Di, Ns], B, C [B, G, Ns, L], D [Di]."""
    u, dl, A, B, C = u.double(), delta.double(), A.double(), B.double(), C.double()
    dl = dl if delta_bias is None else dl + delta_bias.double()[:, None]
    dl = F.softplus(dl) if delta_softplus else dl
    channels = u.shape[1] // B.shape[1]  # of a group
    B, C = B.repeat_interleave(channels, 1), C.repeat_interleave(channels, 1)  # [B, Di, Ns, L]
    h, y = u.new_zeros(*u.shape[:2], A.shape[1]), []
    for t in range(u.shape[2]):
        h = torch.exp(dl[..., t, None] * A) * h + dl[..., t, None] * B[..., t] * u[..., t, None]
        y.append((h * C[..., t]).sum(2))
    out = torch.stack(y, 2) if y else u
    out = out if D is None else out + D.double()[:, None] * u
    return (out if z is None else out * F.silu(z.double())), h


def final_state_reference(x: torch.Tensor, Wa: torch.Tensor, Wu: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """s_T [B, S] float64 of x [B, T, D]: s_t = Wa s_{t-1} + Wu x_t + c, s_0 = 0."""
    s = x.new_zeros(x.shape[0], Wa.shape[0], dtype=torch.float64)
    for t in range(x.shape[1]):
        s = s @ Wa.double().T + x[:, t].double() @ Wu.double().T + c.double()
    return s
