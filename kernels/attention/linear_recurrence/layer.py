"""LinearRecurrence: two linear maps and the state that they end in."""

import torch
from torch import nn

from planmill.kernels.attention.linear_recurrence.recurrence import reach_final_state


class LinearRecurrence(nn.Module):
    """The state that a sequence leaves in a linear recurrence: `s_t = transition(s_{t-1}) + projection(x_t)`, s_0 = 0.

    Args:
        dim: D, channels of the tokens.
        states: S.
        bias: of both maps.

    Shapes: x [B, T, D] -> s_T [B, S], dtype of x. A graph of torch.export has a fixed T.

    Source: MorpMamba's public notebook: see `reach_final_state`. Its Keras kernels are the transposes of these weights.
    """

    def __init__(
        self, dim: int, states: int, bias: bool = True, *, device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.transition = nn.Linear(states, states, bias=bias, device=device, dtype=dtype)
        self.projection = nn.Linear(dim, states, bias=bias, device=device, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The final state of `x` [B, T, D]."""
        bias = None if self.projection.bias is None else self.projection.bias + self.transition.bias
        return reach_final_state(x, self.transition.weight, self.projection.weight, bias).to(x.dtype)
