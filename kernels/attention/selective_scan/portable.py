"""The recurrence as one Scan: the number of steps need not be known."""

import torch
from torch.nn import functional as F

from planmill.kernels.common.portable import State, scan


def selective_scan_portable(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor, z: torch.Tensor, delta_bias: torch.Tensor, delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See the reference; in float32."""
    x, dl, a = u.float(), delta.float(), A.float()
    dl = dl + delta_bias.float()[:, None] if delta_bias.numel() else dl
    dl = F.softplus(dl) if delta_softplus else dl
    groups, channels = B.shape[1], u.shape[1] // B.shape[1]

    def step(state: State, now: State, constants: State) -> tuple[State, State]:
        dl_t, x_t, B_t, C_t = now  # [B, G, c, 1] twice, [B, G, 1, Ns] twice
        h = torch.exp(dl_t * constants[0]) * state[0] + x_t * B_t
        return [h], [(h * C_t).sum(3)]

    # Every reshape stands outside the loop: see gated_linear_attention.
    rows = [t.permute(2, 0, 1).unflatten(2, (groups, channels))[..., None] for t in (dl, dl * x)]
    shared = [t.float().permute(3, 0, 1, 2)[..., None, :] for t in (B, C)]
    start = x.new_zeros(u.shape[0], groups, channels, A.shape[1])
    (h,), (y,) = scan(step, [start], [*rows, *shared], [a.unflatten(0, (groups, channels))])
    h, y = h.flatten(1, 2), y.flatten(2, 3).permute(1, 2, 0)
    y = y + D.float()[:, None] * x if D.numel() else y
    y = y * F.silu(z.float()) if z.numel() else y
    return y.to(u.dtype), h
