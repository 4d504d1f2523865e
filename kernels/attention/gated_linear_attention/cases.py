"""Inputs of gated_linear_attention that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.common.inputs import normal
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)


def gates(g: torch.Generator, dtype: torch.dtype, *shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Logarithms of gates as the layers make them: logsigmoid(z) / 16."""
    return (F.logsigmoid(torch.randn(*shape, generator=g) * scale + mean) / 16).to(dtype)


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, tokens: int, heads: int, keys: int, values: int, *,
    both: bool = True, state: bool = False, return_state: bool = False, gate: float = 0.0, spread: float = 1.0,
    gate_dtype: torch.dtype | None = None, **options: float,
) -> tuple:  # fmt: skip
    """Arguments in schema order; `gate` and `spread` are mean and deviation of the gates' logits."""
    q, k = (normal(g, dtype, batch, tokens, heads, keys, **options) for _ in range(2))
    v = normal(g, dtype, batch, tokens, heads, values, **options)
    kind = gate_dtype or dtype
    forward, backward = (gates(g, kind, batch, tokens, heads, keys, mean=gate, scale=spread) for _ in range(2))
    initial = torch.randn(batch, heads, keys, values, generator=g) if state else torch.empty(0)
    return q, k, v, forward, backward if both else torch.empty(0, dtype=kind), initial, keys**-0.5, return_state


def changed(change: Callable[..., object], **options: Any) -> Callable[..., tuple]:
    """Arguments after `change(q, k, v, log_gates, backward_log_gates)`."""

    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        args = drawn(dtype, g, 2, 35, 2, 8, 11, **options)
        change(*(x for x in args[:5] if x.numel()))
        return args

    return make


def _nan_value(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> None:
    v[0, 20, 1, 3] = k[1, 5, 0, 2] = q[1, 30, 1, 0] = torch.nan


def _nan_gate(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, forward: torch.Tensor, *rest: torch.Tensor) -> None:
    forward[1, 17, 1, 4] = torch.nan


def _shut(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> None:
    """Gates of zero among gates near one: what stood before is gone, what follows is as precise as ever."""
    for gate in gates:
        gate[:, ::7], gate[:, 1::3, :, ::2], gate[:, 20:22] = -6.25, -torch.inf, -3000.0


def _padded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *gates: torch.Tensor) -> None:
    """Tokens of padding: k = 0 and open gates carry the state past them."""
    k[1, 23:] = 0
    for gate in gates:
        gate[1, 23:] = 0


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """Head-major storage, every second channel, and keys that all heads share."""
    q, k, v, forward, backward, *rest = drawn(dtype, g, 2, 19, 3, 6, 10)
    wide = torch.full((2, 3, 19, 20), torch.nan, dtype=dtype)
    values = wide[..., ::2].transpose(1, 2)
    values.copy_(v)
    q = q.transpose(1, 2).contiguous().transpose(1, 2)
    return q, k[:, :, :1].expand_as(k), values, forward.flip(3).mT.contiguous().mT, backward[:1].expand_as(k), *rest


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, tokens, heads, keys, values = sizes
            return drawn(dtype, g, batch, tokens, heads, keys, values, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    made = [  # batch, tokens, heads, keys, values
        case("small", 2, 3, 2, 4, 6, compiled=True, gradient=True, dtypes=FLOAT32),
        case("odd", 2, 11, 3, 5, 7),
        case("one", 1, 1, 1, 1, 1),
        case("one_causal", 2, 1, 1, 3, 2, both=False, state=True, return_state=True),
        case("causal", 2, 37, 2, 12, 20, both=False, gradient=True),
        case("stream", 2, 18, 2, 9, 13, both=False, state=True, return_state=True, gradient=True),
        case("state_out", 1, 33, 1, 16, 16, both=False, return_state=True),
        case("fifteen", 1, 15, 2, 8, 16),
        case("sixteen", 1, 16, 2, 16, 16),
        case("past_a_chunk", 1, 17, 2, 17, 33),
        case("past_a_block", 1, 65, 1, 32, 64),
        case("wide", 1, 20, 1, 133, 70, both=False, state=True, return_state=True),
        case("vision", 1, 197, 1, 32, 64, dtypes=FLOAT32),
        case("closing", 1, 63, 2, 8, 16, gate=-100.0),
        case("mixed_gates", 1, 64, 2, 8, 16, gate=-30.0, spread=100.0),
        case("open", 1, 64, 2, 8, 16, gate=200.0),
        case("float32_gates", 2, 21, 2, 8, 16, gate_dtype=torch.float32),
        case("large_mean", 1, 40, 2, 8, 16, mean=10.0),
        case("tiny", 1, 20, 2, 8, 16, scale=1e-12, dtypes=(torch.float32, torch.bfloat16)),
        case("no_batch", 0, 5, 2, 4, 4),
        case("no_tokens", 2, 0, 2, 4, 4, both=False, state=True, return_state=True),
        case("no_heads", 2, 5, 0, 4, 4),
        case("no_values", 2, 5, 2, 4, 0),
        Case("strided", _strided),
    ]
    for change in (_nan_value, _nan_gate, _shut, _padded):
        made.append(Case(change.__name__[1:], changed(change), FLOAT32))
        made.append(Case(f"{change.__name__[1:]}_causal", changed(change, both=False), FLOAT32))
    return made
