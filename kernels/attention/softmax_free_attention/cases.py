"""Inputs of softmax_free_attention that tests, benchmarks and plan checks share."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)
NORMALIZED: dict[str, Any] = {"normalize": True, "ridge": 0.0}


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, heads: int, tokens: int, m: int, d: int, dv: int | None = None,
    *, spread: float = 1.0, scale: float | None = None, mode: str = "newton", iterations: int = 20, ridge: float = 0.01,
    normalize: bool = False, batch_coupled: bool = False, make: Callable[..., torch.Tensor] = normal, **options: Any,
) -> tuple:  # fmt: skip
    """Queries about as far from each other as landmarks, whose kernel is neither the identity nor all ones."""
    scale = d**-0.25 if scale is None else scale
    q = make(g, dtype, batch, heads, tokens, d, **options)
    options = {key: value * scale for key, value in options.items()} if make is normal else options
    landmarks = make(g, torch.float32, batch, heads, m, d, **options)
    centre = landmarks.mean(2, keepdim=True) if m else landmarks
    landmarks = (centre + (landmarks - centre) * spread * (scale if make is normal else 1)).to(dtype)
    return (
        q,
        normal(g, dtype, batch, heads, tokens, dv or d),
        landmarks,
        scale,
        mode,
        iterations,
        ridge,
        normalize,
        batch_coupled,
    )


def _changed(change: Callable[..., tuple], **options: Any) -> Callable[..., tuple]:
    def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
        q, v, landmarks, *rest = drawn(dtype, g, 2, 3, 11, 6, 8, **options)
        return *change(q, v, landmarks), *rest

    return make


def _nan_query(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> tuple:
    return poison_row(q, 40), v, landmarks


def _nan_value(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> tuple:
    return q, poison_row(v, 3), landmarks


def _nan_landmark(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> tuple:
    return q, v, poison_row(landmarks, 20)


def _infinite(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> tuple:
    return poison_row(poison_row(q, 5, torch.inf), 6, -torch.inf), v, poison_row(landmarks, 8, torch.inf)


def _far(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> tuple:
    q = q.clone()
    q[0, 1], q[1, 2, 3:] = 1e4, -3e4
    return q, v, landmarks


def _strided(q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor) -> tuple:
    return strided(q), v.transpose(1, 2).contiguous().transpose(1, 2), strided(landmarks)


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            return drawn(dtype, g, *sizes, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    return [  # batch, heads, tokens, landmarks, d, dv
        case("small", 2, 2, 6, 3, 4, dtypes=FLOAT32, compiled=True, gradient=True),
        case("one", 1, 1, 1, 1, 1),
        case("one_landmark", 2, 1, 9, 1, 5, gradient=True),
        case("odd", 2, 3, 37, 7, 13, 9),
        case("past_a_tile", 1, 2, 131, 49, 32),
        case("wide", 1, 1, 50, 17, 5, 70),
        case("several_chunks", 1, 1, 2100, 5, 8),
        case("many_landmarks", 1, 1, 70, 131, 16, iterations=8, dtypes=FLOAT32),
        case("few_steps", 1, 2, 40, 17, 8, iterations=3, gradient=True),
        case("no_steps", 1, 1, 10, 5, 8, iterations=0),
        case("same_landmarks", 1, 2, 40, 49, 8, spread=0.0, dtypes=FLOAT32),
        case("near_landmarks", 1, 2, 40, 49, 8, spread=0.05, dtypes=FULL_RANGE),
        case("no_ridge", 1, 2, 40, 20, 8, ridge=0.0, spread=0.5),
        case("large_ridge", 1, 2, 40, 20, 8, ridge=0.05),
        case("solve", 2, 2, 37, 21, 8, mode="solve", gradient=True),
        case("solve_same", 1, 2, 40, 49, 8, spread=0.0, mode="solve", dtypes=FLOAT32),
        case("solve_past_a_tile", 1, 1, 60, 67, 16, 3, mode="solve"),
        case("solve_many", 1, 1, 40, 260, 8, mode="solve", dtypes=FLOAT32),
        case("solve_normalized", 1, 2, 40, 19, 8, mode="solve", normalize=True),
        case("normalized", 2, 2, 37, 21, 8, **NORMALIZED, gradient=True),
        case("normalized_near", 2, 2, 37, 21, 8, **NORMALIZED, spread=0.2),
        case("normalized_many", 1, 1, 40, 130, 8, **NORMALIZED, iterations=6, dtypes=FLOAT32),
        case("coupled", 3, 2, 37, 21, 8, **NORMALIZED, batch_coupled=True, spread=0.3, gradient=True),
        case("large_mean", 1, 2, 40, 12, 8, mean=100.0, dtypes=FLOAT32),
        case("huge", 1, 2, 40, 12, 8, scale=30.0, dtypes=FULL_RANGE),
        case("tiny", 1, 2, 40, 12, 8, scale=1e-6),
        case("ties", 1, 2, 40, 12, 4, scale=0.5, make=integers),
        case("no_tokens", 2, 2, 0, 3, 4),
        case("no_batch", 0, 2, 5, 3, 4),
        Case("strided", _changed(_strided)),
        Case("nan_query", _changed(_nan_query), FLOAT32),
        Case("nan_value", _changed(_nan_value), FLOAT32),
        Case("nan_landmark", _changed(_nan_landmark), FLOAT32),
        Case("nan_solve", _changed(_nan_landmark, mode="solve"), FLOAT32),
        Case("nan_normalized", _changed(_nan_query, **NORMALIZED), FLOAT32),
        Case("infinite", _changed(_infinite), FLOAT32),
        Case("far", _changed(_far), FULL_RANGE),
    ]  # fmt: skip
