"""S_t = diag(alpha_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t; both directions: the mean of the two."""

import torch


def scan(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """o [B, N, H, dv] and the last state [B, H, dk, dv], token by token."""
    o = [v[:, :0]]
    for t in range(q.shape[1]):
        S = log_alpha[:, t].exp()[..., None] * S + k[:, t, :, :, None] * v[:, t, :, None]
        o.append((q[:, t, :, :, None] * S).sum(2)[:, None])
    return torch.cat(o, 1), S


def gated_linear_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gates: torch.Tensor, backward_log_gates: torch.Tensor,
    initial_state: torch.Tensor, scale: float, return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """o [B, N, H, dv] in the dtype of v, and the state after the last token, float32, [B or 0, H, dk, dv]."""
    Q, K, V, F, Bw = (x.double() for x in (q, k, v, log_gates, backward_log_gates))
    S0 = initial_state.double()
    if not S0.numel():  # absent: zeros, its sum
        S0 = Q.new_zeros(Q.shape[0], *Q.shape[2:], V.shape[3]) + S0.sum()
    o, S = scan(scale * Q, K, V, F, S0)
    if not Bw.numel():
        o = o + Bw.sum()
    else:
        backward, _ = scan(scale * Q.flip(1), K.flip(1), V.flip(1), Bw.flip(1), S0)
        o = (o + backward.flip(1)) / 2
    return o.to(v.dtype), S.float()[: S.shape[0] * int(return_state)]
