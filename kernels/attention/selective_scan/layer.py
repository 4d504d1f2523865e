"""MambaMixer: Mamba's block around the selective scan, one way or both."""

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.selective_scan.op import scan_selectively

STEP_SIZES = (1e-3, 1e-1)  # softplus of the time step's bias, at the start


class MambaMixer(nn.Module):
    """Mamba's mixer: projection, short causal convolution, selective scan, gate, projection.

    Parameters are named as in state-spaces/mamba and transformers (`in_proj`, `conv1d`, `x_proj`, `dt_proj`, `A_log`,
    `D`, `out_proj`): their state dicts load. Two-way mixers add `conv1d_b`, `x_proj_b`, `dt_proj_b`, `A_b_log` and
    `D_b` for the sequence read backwards, as Vision Mamba's "v2"; both share the projections, and their results are
    added.

    Args:
        d_model: C, channels of the tokens.
        d_state: Ns, states of a channel.
        d_conv: taps of the convolution.
        expand: inner channels Di = expand * C.
        dt_rank: width from which the time steps are made; None: C / 16, rounded up.
        conv_bias, bias: of the convolution; of in_proj and out_proj.
        bidirectional: read the sequence backwards too.

    Shapes: x [B, L, C] -> the same.

    Source: Gu and Dao (2023), section 3.4; two ways: Zhu et al., "Vision Mamba" (ICML 2024), whose public code was
    read second-hand, in projects that contain it. The incremental step of text generation is not part of it.
    """

    def __init__(
        self, d_model: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None,
        conv_bias: bool = True, bias: bool = False, *, bidirectional: bool = False,
        device: torch.device | None = None, dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        inner, rank = int(expand * d_model), dt_rank or math.ceil(d_model / 16)
        self.d_state, self.dt_rank, self.bidirectional = d_state, rank, bidirectional
        made: Any = {"device": device, "dtype": dtype}
        self.in_proj = nn.Linear(d_model, 2 * inner, bias=bias, **made)
        for suffix in self.suffixes():
            conv = nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1, bias=conv_bias, **made)
            steps = nn.Linear(rank, inner, **made)
            nn.init.uniform_(steps.weight, -(rank**-0.5), rank**-0.5)
            low, high = (math.log(size) for size in STEP_SIZES)
            size = torch.exp(torch.rand(inner, device=device) * (high - low) + low)
            steps.bias.data = (size + torch.log(-torch.expm1(-size))).to(steps.bias.dtype)  # softplus gives the size
            self.add_module(f"conv1d{suffix}", conv)
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, rank + 2 * d_state, bias=False, **made))
            self.add_module(f"dt_proj{suffix}", steps)
            rates = torch.arange(1, d_state + 1, dtype=torch.float32, device=device).log().repeat(inner, 1)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(rates))
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner, device=device)))
        self.out_proj = nn.Linear(inner, d_model, bias=bias, **made)

    def suffixes(self) -> tuple[str, ...]:
        """Of the parameters of each direction."""
        return ("", "_b") if self.bidirectional else ("",)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mix `x` [B, L, C]."""
        if x.dim() != 3 or x.shape[2] != self.in_proj.in_features:
            raise ValueError(f"MambaMixer: x must be [B, L, {self.in_proj.in_features}], got {list(x.shape)}")
        if x.shape[1] == 0:
            return self.out_proj(self.in_proj(x)[..., : self.out_proj.in_features])
        states = self.in_proj(x).mT  # [B, 2 Di, L]
        y = self._read(states, "")
        if self.bidirectional:
            y = y + self._read(states.flip(2), "_b").flip(2)
        return self.out_proj(y.mT)

    def _read(self, states: torch.Tensor, suffix: str) -> torch.Tensor:
        """One direction: [B, Di, L] of values and gates [B, 2 Di, L]."""
        conv, x_proj = self.get_submodule(f"conv1d{suffix}"), self.get_submodule(f"x_proj{suffix}")
        values, gates = states.chunk(2, 1)
        values = F.silu(conv(values)[..., : values.shape[2]])
        dt, B, C = x_proj(values.mT).split([self.dt_rank, self.d_state, self.d_state], 2)
        bias = self.get_parameter(f"dt_proj{suffix}.bias")
        return scan_selectively(
            values, F.linear(dt, self.get_parameter(f"dt_proj{suffix}.weight")).mT,
            -torch.exp(self.get_parameter(f"A{suffix}_log").float()), B.mT, C.mT, self.get_parameter(f"D{suffix}"),
            gates, bias, delta_softplus=True,
        )[0]  # fmt: skip

    def extra_repr(self) -> str:
        """Options, as `print` shows them."""
        return f"d_state={self.d_state}, dt_rank={self.dt_rank}, bidirectional={self.bidirectional}"
