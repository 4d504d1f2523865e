"""Layers of gated linear attention: fla's, causal, and ViG's, in both directions beside a depthwise convolution."""

import math
from collections.abc import Mapping

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.attention.gated_linear_attention.loading import read_fla, read_vig
from planmill.kernels.attention.gated_linear_attention.op import attend_with_gates, stream_with_gates
from planmill.kernels.attention.gated_linear_attention.result import Streamed


class Scale(nn.Module):
    """Root-mean-square normalisation of the last dimension and a weight for each of its channels, in float32."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """float32, whatever the dtype of `x`."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps)


def log_gates(z: torch.Tensor, divisor: float, lowest: float | None) -> torch.Tensor:
    """logsigmoid(z) / divisor in float32, exact for any z; not below `lowest`."""
    gates = F.logsigmoid(z.float()) / divisor
    return gates if lowest is None else gates.clamp_min(lowest)


def widths(name: str, dim: int, heads: int, key_ratio: float, value_ratio: float) -> tuple[int, int]:
    """All heads' key and value channels."""
    keys, values = int(dim * key_ratio + 1e-6), int(dim * value_ratio + 1e-6)  # a ratio of integers may fall short
    if heads < 1 or keys % heads or values % heads or keys < heads:
        raise ValueError(f"{name}: heads must divide {keys} key and {values} value channels, got {heads}")
    return keys, values


def low_rank(dim: int, rank: int, out: int) -> nn.Sequential:
    """Projection of gates."""
    return nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, out))


class GatedLinearAttention(nn.Module):
    """Gated linear attention as in flash-linear-attention: `y = (rms_norm(o) * silu(x Wg)) Wo` in every head.

        q = x Wq;  k = x Wk;  v = x Wv;  log_gates = logsigmoid((x W1) W2 + b2) / gate_divisor;  o: attend_with_gates

    Parameters have the names of fla's `GatedLinearAttention`, so that `load_state_dict` reads its checkpoints. Gates
    and norm are float32 whatever the dtype of x. A bidirectional layer, which fla does not have, is the half sum of
    both directions, with gates of its own for the second (`gk_proj_backward`).

    Args:
        dim: D.
        heads: H.
        key_ratio, value_ratio: all heads' key and value channels, as parts of D.
        kv_heads: heads of k, v and the gates, each shared by H / kv_heads heads in a row; H if None.
        gate_rank, gate_divisor: rank of W1 W2, and what logsigmoid is divided by.
        clamp_min: log gates are not below this; None: they are what they are.
        eps: of the norm.
        bidirectional: a token's result depends on all tokens of its sample; otherwise on itself and those before it.

    Shapes: x [B, N, D] -> [B, N, D], dtype of x.

    Source: Yang et al., "Gated linear attention transformers with hardware-efficient training" (ICML 2024), 4.4.
    """

    def __init__(
        self, dim: int, heads: int = 4, *, key_ratio: float = 0.5, value_ratio: float = 1.0,
        kv_heads: int | None = None, gate_rank: int = 16, gate_divisor: float = 16.0, clamp_min: float | None = None,
        eps: float = 1e-5, bidirectional: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        keys, values = widths("GatedLinearAttention", dim, heads, key_ratio, value_ratio)
        kv_heads = heads if kv_heads is None else kv_heads
        if kv_heads < 1 or heads % kv_heads:
            raise ValueError(f"GatedLinearAttention: kv_heads must divide {heads} heads, got {kv_heads}")
        self.heads, self.groups = heads, heads // kv_heads
        self.gate_divisor, self.clamp_min = float(gate_divisor), clamp_min
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys // self.groups, bias=False)
        self.v_proj = nn.Linear(dim, values // self.groups, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.gk_proj = low_rank(dim, gate_rank, keys // self.groups)
        self.gk_proj_backward = low_rank(dim, gate_rank, keys // self.groups) if bidirectional else None
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.g_norm_swish_gate = Scale(values // heads, eps)

    @classmethod
    def from_fla(
        cls, source: nn.Module | Mapping[str, torch.Tensor], heads: int | None = None, *, gate_divisor: float = 16.0,
        clamp_min: float | None = None, eps: float = 1e-5,
    ) -> "GatedLinearAttention":  # fmt: skip
        """The layer with the parameters of fla's `GatedLinearAttention`, the same objects, or of its state dict.

        The arguments are read from a module; for a state dict `heads` is needed.
        """
        settings, weights = read_fla(source, heads, gate_divisor, clamp_min, eps)
        with torch.device("meta"):
            layer = cls(**settings)
        layer.load_state_dict(weights, assign=True)
        return layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """All tokens of `x`, from an empty state."""
        projected = self._project(x)
        backward = None if self.gk_proj_backward is None else self._gates(self.gk_proj_backward, x)
        return self._finish(x, attend_with_gates(*projected, backward_log_gates=backward))

    def stream(self, x: torch.Tensor, state: torch.Tensor | None = None) -> Streamed:
        """The next tokens of a stream, from the state that earlier ones left: (y, state), as `stream_with_gates`."""
        if self.gk_proj_backward is not None:
            raise ValueError("GatedLinearAttention: a bidirectional layer needs all tokens at once, it has no stream")
        streamed = stream_with_gates(*self._project(x), state)
        return Streamed(self._finish(x, streamed.out), streamed.state)

    def _project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        check_tokens("GatedLinearAttention", x, self.q_proj.in_features)
        q = self.q_proj(x).unflatten(2, (self.heads, -1))
        return q, self._share(self.k_proj(x)), self._share(self.v_proj(x)), self._gates(self.gk_proj, x)

    def _gates(self, projection: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return self._share(log_gates(projection(x), self.gate_divisor, self.clamp_min))

    def _share(self, x: torch.Tensor) -> torch.Tensor:
        """[B, N, H, d], each of the kv_heads for the heads in a row that share it."""
        x = x.unflatten(2, (self.heads // self.groups, -1))
        return x if self.groups == 1 else x.repeat_interleave(self.groups, 2)

    def _finish(self, x: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        gate = F.silu(self.g_proj(x).float())
        return self.o_proj((self.g_norm_swish_gate(o).flatten(2) * gate).to(x.dtype))

    def extra_repr(self) -> str:
        """The settings."""
        return f"heads={self.heads}, gate_divisor={self.gate_divisor}, clamp_min={self.clamp_min}"


class ViGAttention(nn.Module):
    """Gated linear attention in both directions, mixed with a depthwise convolution of the picture, as in ViG.

        u = conv(x), 3 x 3, depthwise, then SiLU where conv_activation
        q, k, v = u Wqkv;  log gates of both directions = logsigmoid((u W1) W2 + b2) / gate_divisor
        o = attend_with_gates(q, k, v, forward, backward_log_gates=backward)
        lam = sigmoid(u Wg + bg);  y = lam rms_norm(o) + (1 - lam) rms_norm(u), per head, then SiLU where out_activation
        out = y Wo

    Parameters have the names of ViG's `GatedLinearAttention`. Its inference code halves o twice where its training code
    halves once; after the norm only eps tells: `halved_twice` does as its inference code. Gates, norms and the mix
    are float32 whatever the dtype of x. Rotary embeddings and class tokens, which its inference code leaves out, are
    not here.

    Args:
        dim: C.
        heads: H, of C / H value channels each.
        key_ratio: all heads' key channels, as a part of C.
        conv_activation, conv_bias, out_activation: as above; ViG-T has both activations, no bias.
        gate_rank, gate_divisor, clamp_min: as in `GatedLinearAttention`.
        eps: of both norms.
        halved_twice: see above.

    Shapes: x [B, N, C], rows of pixels one after another, with height * width = N -> [B, N, C], dtype of x.

    Source: Liao et al., "ViG: linear-complexity visual sequence learning with gated linear attention" (AAAI 2025),
    section 3.
    """

    def __init__(
        self, dim: int, heads: int, *, key_ratio: float = 0.5, conv_activation: bool = True, conv_bias: bool = False,
        out_activation: bool = False, gate_rank: int = 16, gate_divisor: float = 16.0, clamp_min: float | None = None,
        eps: float = 1e-6, halved_twice: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        keys, _ = widths("ViGAttention", dim, heads, key_ratio, 1.0)
        self.heads, self.out_activation, self.halved_twice = heads, out_activation, halved_twice
        self.gate_divisor, self.clamp_min = float(gate_divisor), clamp_min
        conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=conv_bias)
        self.in_proj = nn.Sequential(conv, nn.SiLU() if conv_activation else nn.Identity())
        self.qkv_proj = nn.Linear(dim, 2 * keys + dim, bias=False)
        self.gk_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, 2 * keys))
        self.g_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.g_norm, self.l_norm = Scale(dim // heads, eps), Scale(dim // heads, eps)

    @classmethod
    def from_vig(
        cls, source: nn.Module | Mapping[str, torch.Tensor], heads: int | None = None, *, conv_activation: bool = True,
        out_activation: bool = False, gate_divisor: float = 16.0, clamp_min: float | None = None, eps: float = 1e-6,
        halved_twice: bool = False,
    ) -> "ViGAttention":  # fmt: skip
        """The layer with the parameters of ViG's `GatedLinearAttention`, the same objects, or of its state dict.

        The arguments are read from a module, but for `halved_twice`; for a state dict `heads` is needed.
        """
        settings, weights = read_vig(source, heads, conv_activation, out_activation, gate_divisor, clamp_min, eps)
        with torch.device("meta"):
            layer = cls(**settings, halved_twice=halved_twice)
        layer.load_state_dict(weights, assign=True)
        return layer

    def forward(self, x: torch.Tensor, height: int | None = None, width: int | None = None) -> torch.Tensor:
        """Mix `x`; height and width may be left out where N is a square."""
        check_tokens("ViGAttention", x, self.o_proj.in_features)
        if height is None and width is None:
            height = width = math.isqrt(x.shape[1])
            if height * width != x.shape[1]:
                raise ValueError(f"ViGAttention: {x.shape[1]} tokens are no square: height and width must be given")
        if height is None or width is None or height < 0 or height * width != x.shape[1]:
            raise ValueError(f"ViGAttention: height * width must be {x.shape[1]}, N of x, got {height} * {width}")
        if x.shape[1] == 0:
            return self.o_proj(x)
        u = self.in_proj(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)
        return self._mix(u)

    def _mix(self, u: torch.Tensor) -> torch.Tensor:
        dim = u.shape[2]
        keys = (self.qkv_proj.out_features - dim) // 2
        q, k, v = (t.unflatten(2, (self.heads, -1)) for t in self.qkv_proj(u).split([keys, keys, dim], 2))
        gates = log_gates(self.gk_proj(u), self.gate_divisor, self.clamp_min)
        forward, backward = (t.unflatten(2, (self.heads, -1)) for t in gates.chunk(2, 2))
        scale = (keys // self.heads) ** -0.5 / (2 if self.halved_twice else 1)
        o = attend_with_gates(q, k, v, forward, backward_log_gates=backward, scale=scale)
        lam = self.g_proj(u).float().sigmoid().unflatten(2, (self.heads, -1))
        y = torch.lerp(self.l_norm(u.unflatten(2, (self.heads, -1))), self.g_norm(o), lam).flatten(2)
        return self.o_proj((F.silu(y) if self.out_activation else y).to(u.dtype))

    def extra_repr(self) -> str:
        """The settings."""
        return f"heads={self.heads}, out_activation={self.out_activation}, halved_twice={self.halved_twice}"


def check_tokens(name: str, x: torch.Tensor, dim: int) -> None:
    """Raise ValueError unless `x` is [B, N, dim]."""
    if x.dim() != 3 or x.shape[2] != dim:
        raise ValueError(f"{name}: x must be [B, N, {dim}], got {list(x.shape)}")
