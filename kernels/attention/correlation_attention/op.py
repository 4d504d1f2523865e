"""correlation_attention: schema, shape rule, checks and the public functions."""

import math

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.correlation_attention.cases import cases, compare
from planmill.kernels.attention.correlation_attention.reference import MAPS, correlation_attention_reference
from planmill.kernels.attention.correlation_attention.result import Streams
from planmill.kernels.common.checks import check_alike, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="correlation_attention(Tensor q, Tensor k, Tensor v, str maps, bool original, float scale) "
    "-> (Tensor, Tensor)",
    outputs=lambda q, k, v, maps, original, scale: [
        (v.shape, v.dtype),
        ((v.shape[0] * int(original), *v.shape[1:]), v.dtype),
    ],
    reference=correlation_attention_reference,
    cases=cases,
    tolerances={torch.float32: (2e-5, 2e-5), torch.bfloat16: (1e-2, 1e-2), torch.float16: (2e-3, 2e-3)},
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: str, original: bool, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "correlation_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(op, name, x, 4, "[B, H, N, d]")
        check_float(op, name, x)
        if name != "q":
            check_alike(op, name, x, "q", q)
    if k.shape != q.shape:
        raise ValueError(f"{op}: k must be {list(q.shape)} like q, got {list(k.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"{op}: v must be {[*q.shape[:3], 'dv']} like q, got {list(v.shape)}")
    if q.shape[3] == 0:
        raise ValueError(f"{op}: q must be [B, H, N, d] with d at least 1, got {list(q.shape)}")
    names = maps.split("+")
    if not set(names) <= set(MAPS) or len(set(names)) != len(names):
        raise ValueError(f"{op}: maps must be different ones of {', '.join(MAPS)}, joined by +, got {maps!r}")
    if scale is None:
        scale = q.shape[3] ** -0.5
    elif not math.isfinite(scale):
        raise ValueError(f"{op}: scale must be finite, got {scale}")
    return (_op if is_compiling() else _call)(q, k, v, maps, original, scale)


def attend_by_correlation(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, maps: str = "qq+kk+vv", scale: float | None = None
) -> torch.Tensor:
    """Attention of tokens that are alike: queries with queries, keys with keys, values with values.

    out[b, h] = (sum over the maps X Y of softmax(X Y^T scale)) V, not averaged: three maps have rows that sum to 3.

    The highest score of a row is taken off before exp, in float32, since scores of a row with itself are large. No
    N x N map is written: memory grows as N. On the CPU, 16-bit input is computed in float32, and equal inputs give
    equal bits in any batch and with any number of threads.

    Args:
        q: [B, H, N, d], float16, bfloat16 or float32, any strides; d at least 1.
        k: [B, H, N, d], as q.
        v: [B, H, N, dv], as q. NaN and infinity in v spread over their channel of the head.
        maps: of "qq", "kk", "vv" and "qk" those to sum, joined by "+", each once; "qkv" is the softmax of
            [q, k, v] [q, k, v]^T scale / sqrt(3), Crane's "(q+k+v)^2".
        scale: factor of the scores; d^-0.5 if None.

    Returns:
        [B, H, N, dv], dtype of v. A score that is NaN weighs nothing; a row is NaN where all scores of it are in one
        of the maps, and a row of scores that are all -inf gets nothing from that map. Scores above 1e38 count as equal.

    Raises:
        ValueError: wrong rank or shape, unknown or repeated maps, a scale that is not finite, another device.
        TypeError: another dtype.

    Source: Li et al., "CLIP Surgery for better explainability with enhancement in open-vocabulary tasks" (2023),
    section 3; Salehi et al., "Crane: context-guided prompt learning and attention refinement for zero-shot anomaly
    detection" (2025), E-Attn: the sum of three.
    """
    return _attend(q, k, v, maps, False, scale)[0]


def attend_in_two_streams(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, maps: str = "qq+kk+vv", scale: float | None = None
) -> Streams:
    """`attend_by_correlation` and attention as the model was trained, from one reading of q, k and v.

    new = (sum over the maps X Y of softmax(X Y^T scale)) V;  original = softmax(Q K^T scale) V

    Args:
        q: [B, H, N, d], float16, bfloat16 or float32, any strides; d at least 1.
        k: [B, H, N, d], as q.
        v: [B, H, N, dv], as q.
        maps: see `attend_by_correlation`.
        scale: factor of the scores; d^-0.5 if None.

    Returns:
        new, original: [B, H, N, dv], dtype of v; NaN as in `attend_by_correlation`.

    Raises:
        ValueError: wrong rank or shape, unknown or repeated maps, a scale that is not finite, another device.
        TypeError: another dtype.

    Source: as `attend_by_correlation`.
    """
    return Streams(*_attend(q, k, v, maps, True, scale))
