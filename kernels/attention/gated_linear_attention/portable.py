"""The recurrence as one Scan per direction: the number of tokens need not be known."""

import torch

from planmill.kernels.common.portable import State, scan


def _direction(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_alpha: torch.Tensor, S: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    def step(state: State, x: State, _: State) -> tuple[State, State]:
        q_t, k_t, v_t, alpha_t = x
        after = alpha_t * state[0] + k_t * v_t
        return [after], [(q_t * after).sum(2)]

    # Every reshape stands outside the loop: TensorRT 1.7 moves one out by itself where a cast comes before it, wrongly.
    columns = [x.transpose(0, 1)[..., None] for x in (q, k, log_alpha.exp())]  # [N, B, H, dk, 1]
    (last,), (o,) = scan(step, [S], [*columns[:2], v.transpose(0, 1)[..., None, :], columns[2]])
    return o.transpose(0, 1), last


def gated_linear_attention_portable(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gates: torch.Tensor, backward_log_gates: torch.Tensor,
    initial_state: torch.Tensor, scale: float, return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """See the reference; in float32."""
    Q, K, V, F, Bw = (x.float() for x in (q, k, v, log_gates, backward_log_gates))
    S0 = initial_state.float()
    if not S0.numel():
        S0 = Q.new_zeros(Q.shape[0], *Q.shape[2:], V.shape[3])
    o, S = _direction(scale * Q, K, V, F, S0)
    if Bw.numel():
        backward, _ = _direction(scale * Q.flip(1), K.flip(1), V.flip(1), Bw.flip(1), S0)
        o = (o + backward.flip(1)) / 2
    return o.to(v.dtype), S[: S.shape[0] * int(return_state)]
