"""Inputs of expert_mixture that tests, benchmarks and plan checks share."""

from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case


def assignments(g: torch.Generator, tokens: int, k: int, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Distinct experts [T, k] of each token and weights [T, k] that sum to one."""
    scores = torch.randn(tokens, experts, generator=g)
    found = scores.topk(k, dim=1)
    return found.indices.int(), found.values.softmax(1)


def mixture(
    dtype: torch.dtype, g: torch.Generator, tokens: int, k: int, experts: int, d: int, f: int, *, gated: bool = True,
    bias: bool = False, activation: str = "silu", weight_on_input: bool = False, d_out: int | None = None,
    mean: float = 0.0, scale: float = 1.0,
) -> tuple:  # fmt: skip
    """Arguments whose hidden rows and results are of the order of `scale`."""
    rows, out = 2 * f if gated else f, d if d_out is None else d_out
    x = normal(g, dtype, tokens, d, mean=mean, scale=scale)
    indices, weights = assignments(g, tokens, k, experts)
    up = normal(g, dtype, experts, rows, d, scale=max(d, 1) ** -0.5)
    down = normal(g, dtype, experts, out, f, scale=max(f, 1) ** -0.5)
    up_bias = normal(g, dtype, experts, rows) if bias else torch.empty(0, dtype=dtype)
    down_bias = normal(g, dtype, experts, out) if bias else torch.empty(0, dtype=dtype)
    return x, indices, weights, up, up_bias, down, down_bias, activation, weight_on_input


def _one_expert_takes_all(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, indices, *rest = mixture(dtype, g, 37, 1, 5, 24, 40)
    return x, torch.full_like(indices, 3), *rest


def _repeated_and_dropped(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, _, _, *rest = mixture(dtype, g, 21, 4, 5, 18, 26, bias=True)
    indices = torch.randint(-1, 5, (21, 4), generator=g, dtype=torch.int32)
    indices[3], indices[4] = -1, 2  # a token that goes nowhere, one that goes four times to the same expert
    return x, indices, torch.randn(21, 4, generator=g), *rest


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, indices, weights, up, up_bias, down, down_bias, *rest = mixture(dtype, g, 9, 2, 3, 20, 28, bias=True)
    biases = (strided(up_bias), strided(down_bias))
    return (
        strided(x),
        indices.T.contiguous().T,
        strided(weights),
        strided(up),
        biases[0],
        strided(down),
        biases[1],
        *rest,
    )


def _nan_token(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, indices, *rest = mixture(dtype, g, 13, 2, 3, 33, 20)
    indices[7] = -1
    return poison_row(poison_row(x, 4), 7), indices, *rest


def _unused_nan_expert(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, indices, weights, up, up_bias, down, *rest = mixture(dtype, g, 11, 2, 4, 16, 12)
    indices[indices == 2] = 1
    up[2], down[2] = torch.nan, torch.nan
    return x, indices, weights, up, up_bias, down, *rest


def _exact(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, indices, weights, up, up_bias, down, *rest = mixture(dtype, g, 10, 2, 4, 12, 8, activation="relu", gated=False)
    up, down = integers(g, dtype, *up.shape), integers(g, dtype, *down.shape, high=2)
    return integers(g, dtype, *x.shape), indices, torch.full_like(weights, 0.5), up, up_bias, down, *rest


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Each result within `atol` of the largest of its row, plus `rtol` of itself: sums of products cancel."""
    g, w = got[0].double().cpu(), want[0].double().cpu()
    assert got[0].dtype == want[0].dtype
    assert g.shape == w.shape
    assert torch.equal(g.isnan(), w.isnan()), "NaN where the definition has none, or the reverse"
    finite = w.isfinite()
    torch.testing.assert_close(g.masked_fill(finite, 0), w.masked_fill(finite, 0), rtol=0, atol=0, equal_nan=True)
    g, w = g.where(finite, 0), w.where(finite, 0)
    largest = w.abs().amax(1, keepdim=True) if w.numel() else w
    excess = (g - w).abs() - atol * largest - rtol * w.abs() - torch.finfo(got[0].dtype).tiny
    assert not bool((excess > 0).any()), (
        f"off by {float(excess.max()):.2e} more than allowed of {float(largest.max()):.2e}"
    )


FLOAT32, FULL_RANGE = (torch.float32,), (torch.float32, torch.bfloat16)


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            return mixture(dtype, g, *sizes, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    return [  # tokens, k, experts, D, F
        case("small", 6, 2, 4, 16, 24, bias=True, gradient=True, compiled=True, dtypes=FULL_RANGE),
        case("one", 1, 1, 1, 1, 1),
        case("odd", 19, 3, 5, 37, 51, d_out=29, bias=True, gradient=True),
        case("past_a_tile", 70, 2, 3, 72, 136),
        case("all_experts", 5, 4, 4, 20, 12),
        case("plain_gelu", 17, 2, 3, 40, 65, gated=False, bias=True, activation="gelu", gradient=True),
        case("plain_relu", 9, 1, 4, 31, 33, gated=False, activation="relu", dtypes=FLOAT32),
        case("gated_gelu_tanh", 12, 2, 4, 24, 17, activation="gelu_tanh", bias=True, gradient=True, dtypes=FLOAT32),
        case("weight_on_input", 14, 2, 4, 24, 32, weight_on_input=True, bias=True, gradient=True),
        case("large_mean", 18, 2, 4, 48, 40, mean=20.0),
        case("large", 8, 2, 3, 24, 24, scale=1e12, gated=False, activation="relu", dtypes=FULL_RANGE),
        case("tiny", 8, 2, 3, 24, 24, scale=1e-12, dtypes=FULL_RANGE),
        case("no_tokens", 0, 2, 3, 8, 8, dtypes=FLOAT32),
        case("no_assignments", 5, 0, 3, 8, 8, dtypes=FLOAT32),
        case("no_hidden", 5, 2, 3, 8, 0, bias=True, dtypes=FLOAT32),
        case("no_width", 5, 2, 3, 0, 8, d_out=4, bias=True, dtypes=FLOAT32),
        Case("one_expert_takes_all", _one_expert_takes_all),
        Case("repeated_and_dropped", _repeated_and_dropped, gradient=True),
        Case("strided", _strided),
        Case("nan_token", _nan_token),
        Case("unused_nan_expert", _unused_nan_expert, dtypes=FLOAT32),
        Case("exact", _exact, dtypes=FLOAT32),
    ]
