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
    channels = u.shape[1] // B.shape[1]  # of a group

    def step(state: State, now: State, constants: State) -> tuple[State, State]:
        x_t, dl_t, B_t, C_t = now  # [B, Di], [B, Di], [B, G, Ns], [B, G, Ns]
        b, c = (t[:, :, None].expand(-1, -1, channels, -1).flatten(1, 2) for t in (B_t, C_t))
        h = torch.exp(dl_t[..., None] * constants[0]) * state[0] + (dl_t * x_t)[..., None] * b
        return [h], [(h * c).sum(2)]

    (h,), (rows,) = scan(
        step,
        [x.new_zeros(*u.shape[:2], A.shape[1])],
        [x.permute(2, 0, 1), dl.permute(2, 0, 1), B.float().permute(3, 0, 1, 2), C.float().permute(3, 0, 1, 2)],
        [a],
    )
    y = rows.permute(1, 2, 0)
    y = y + D.float()[:, None] * x if D.numel() else y
    y = y * F.silu(z.float()) if z.numel() else y
    return y.to(u.dtype), h
