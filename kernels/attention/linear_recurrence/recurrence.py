"""The final state of a linear time-invariant recurrence, by doubling."""

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_device, check_float, check_rank


def reach_final_state(
    x: torch.Tensor, transition: torch.Tensor, projection: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """The last state of a linear recurrence over a sequence, in log2 T matrix products instead of T steps.

    `s_t = Wa s_{t-1} + Wu x_t + c` from s_0 = 0, so s_T = sum over t of Wa^(T-t) (Wu x_t + c). Neighbours are combined
    pair by pair, `left Wa^(2^j)^T + right` on level j, so that all of a level is one product: about 2 T S^2 operations,
    and 2 S^3 for each of the powers of Wa.

    Args:
        x: [B, T, D], float32, bfloat16 or float16, any strides.
        transition: Wa [S, S]. Where its spectral radius is above 1, the state grows with T until float32 ends.
        projection: Wu [S, D].
        bias: c [S], added at every step; None: 0.

    Returns:
        s_T [B, S] float32; zeros where T = 0. All arithmetic is float32, whatever the dtypes.

    Raises:
        ValueError: shapes that do not fit, another device.
        TypeError: another dtype.

    Source: the "state space model" of MorpMamba's public notebook, which is this recurrence and not a selective scan.
    Its paper was not checked and may describe another. Doubling is ours.
    """
    op = "reach_final_state"
    check_rank(op, "x", x, 3, "[B, T, D]")
    check_float(op, "x", x)
    states = transition.shape[0] if transition.dim() else 0
    wanted = {"transition": [states, states], "projection": [states, x.shape[2]], "bias": [states]}
    for (name, shape), weight in zip(wanted.items(), (transition, projection, bias), strict=True):
        if weight is None:
            continue
        check_float(op, name, weight)
        check_device(op, name, weight, "x", x)
        if list(weight.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {list(weight.shape)}")
    states_of = F.linear(x.float(), projection.float(), None if bias is None else bias.float())  # [B, T, S]
    if x.shape[1] == 0:
        return states_of.new_zeros(x.shape[0], states)
    power = transition.float()
    while states_of.shape[1] > 1:
        if states_of.shape[1] % 2:
            states_of = F.pad(states_of, (0, 0, 1, 0))  # a zero state before the first changes nothing
        states_of = F.linear(states_of[:, 0::2], power) + states_of[:, 1::2]
        power = power @ power
    return states_of[:, 0]
