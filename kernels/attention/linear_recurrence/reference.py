"""s_t = Wa s_{t-1} + Wu x_t + c, s_0 = 0; step by step, float64."""

import torch


def final_state_reference(x: torch.Tensor, Wa: torch.Tensor, Wu: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """s_T [B, S] float64 of x [B, T, D]."""
    s = x.new_zeros(x.shape[0], Wa.shape[0], dtype=torch.float64)
    for t in range(x.shape[1]):
        s = s @ Wa.double().T + x[:, t].double() @ Wu.double().T + c.double()
    return s
