"""BottleneckMix: k of E bottleneck filters, chosen by a gate."""

import math

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice
from planmill.kernels.routing.expert_mixture import mix_experts
from planmill.kernels.routing.expert_mixture.reference import ACTIVATIONS
from planmill.kernels.routing.token_routing import route_tokens


class BottleneckMix(nn.Module):
    """`y = sum over the k chosen filters of g_e (Up_e act(Down_e x + c_e) + b_e)`, plus x with `residual`.

    The gate is a linear layer on the mean over all positions (`gate_by="sample"`) or on each position; g is the softmax
    of its k largest logits, ties to the lower filter. Gated by sample, all positions share their filters: those of a
    sample are joined into one bottleneck of width k * hidden, two products a sample. Gated by position, it is
    `mix_experts`. Means and gate are float32.

    Nothing of this is published but the idea: whether filters are 1 x 1 convolutions, the activation, the reduction,
    what the gate sees and whether there is a residual are our choice, and settings here.

    Args:
        channels: C.
        filters, k: E, and how many of them a sample (position) uses.
        hidden: width of a bottleneck; channels // 4 if None.
        gate_by: "sample" or "position".
        activation: "relu", "silu", "gelu" or "gelu_tanh".
        residual: add x.

    Shapes: x [B, N, C], or [B, C, H, W] of any memory format, read without a copy where it is gated by sample -> the
    same; an image comes back channels-last. Samples do not depend on each other; a NaN makes its own sample NaN
    (by position: its position).

    Source: MemoryOut's sparse feature filtering module, by its abstract.
    """

    def __init__(
        self, channels: int, filters: int, k: int = 2, hidden: int | None = None, *, gate_by: str = "sample",
        activation: str = "relu", residual: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        check_choice("BottleneckMix", "gate_by", gate_by, ("sample", "position"))
        check_choice("BottleneckMix", "activation", activation, tuple(ACTIVATIONS))
        if not 1 <= k <= filters:
            raise ValueError(f"BottleneckMix: k must be from 1 to filters = {filters}, got {k}")
        hidden = max(1, channels // 4) if hidden is None else hidden
        self.k, self.gate_by, self.activation, self.residual = k, gate_by, activation, residual
        self.gate = nn.Linear(channels, filters)
        down, up = 1 / math.sqrt(channels), 1 / math.sqrt(hidden)
        self.down = nn.Parameter(torch.empty(filters, hidden, channels).uniform_(-down, down))
        self.down_bias = nn.Parameter(torch.empty(filters, hidden).uniform_(-down, down))
        self.up = nn.Parameter(torch.empty(filters, channels, hidden).uniform_(-up, up))
        self.up_bias = nn.Parameter(torch.empty(filters, channels).uniform_(-up, up))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Filter `x`."""
        channels = self.gate.in_features
        if not (x.dim() == 3 and x.shape[2] == channels) and not (x.dim() == 4 and x.shape[1] == channels):
            shapes = f"[B, N, {channels}] or [B, {channels}, H, W]"
            raise ValueError(f"BottleneckMix: x must be {shapes}, got {list(x.shape)}")
        rows = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        y = self._by_sample(rows) if self.gate_by == "sample" else self._by_position(rows)
        y = y.transpose(1, 2).unflatten(2, x.shape[2:]) if x.dim() == 4 else y
        return x + y if self.residual else y

    def _route(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = F.linear(rows.float(), self.gate.weight.float(), self.gate.bias.float())
        return route_tokens(logits, self.k, order="topk_then_softmax")

    def _by_sample(self, x: torch.Tensor) -> torch.Tensor:
        chosen, g = self._route(x.mean(1, dtype=torch.float32))  # [B, k]
        index, weights = chosen.long(), g.to(x.dtype)
        down = self.down[index].flatten(1, 2)  # [B, k * hidden, C]
        up = self.up[index].transpose(2, 3).flatten(1, 2)  # [B, k * hidden, C]
        h = torch.baddbmm(self.down_bias[index].flatten(1)[:, None], x, down.transpose(1, 2))
        h = ACTIVATIONS[self.activation](h) * weights.repeat_interleave(self.down.shape[1], 1)[:, None]
        return torch.baddbmm((weights[:, :, None] * self.up_bias[index]).sum(1)[:, None], h, up)

    def _by_position(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[2])
        chosen, g = self._route(rows)
        y = mix_experts(
            rows, chosen, g, self.down, self.up, up_bias=self.down_bias, down_bias=self.up_bias,
            activation=self.activation,
        )  # fmt: skip
        return y.view(x.shape)

    def extra_repr(self) -> str:
        """The settings."""
        filters, hidden, channels = self.down.shape
        return f"{channels}, filters={filters}, k={self.k}, hidden={hidden}, gate_by={self.gate_by!r}"
