"""y_t = sum_j a_tj Expert_e(x_t), e = idx_tj; float64, one expert after the other."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu": F.relu,
}  # fmt: skip


def expert_mixture_reference(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor, activation: str, weight_on_input: bool,
) -> torch.Tensor:  # fmt: skip
    """The mixture [T, D_out] of the dtype of `x`."""
    experts, d_out, f = down.shape
    if bool(((indices < -1) | (indices >= experts)).any()):
        raise ValueError(f"expert_mixture: indices must be -1 or below E = {experts}")
    terms = x.new_zeros(*indices.shape, d_out, dtype=torch.float64)  # a_tj Expert(x_t); zero where idx_tj = -1
    for e in range(experts):
        t, j = (indices == e).nonzero(as_tuple=True)
        if t.numel() == 0:
            continue
        a, h = weights[t, j, None].double(), x[t].double()
        h = F.linear(a * h if weight_on_input else h, up[e].double())
        if up_bias.numel():
            h = h + up_bias[e].double()
        gate, rest = (h[:, :f], h[:, f:]) if up.shape[1] == 2 * f else (h, None)
        h = ACTIVATIONS[activation](gate)
        y = F.linear(h if rest is None else h * rest, down[e].double())
        if down_bias.numel():
            y = y + down_bias[e].double()
        terms[t, j] = y if weight_on_input else a * y
    return terms.sum(1).to(x.dtype)
