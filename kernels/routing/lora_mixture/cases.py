"""Inputs of lora_mixture that tests, benchmarks and plan checks share."""

from typing import Any

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
FULL_RANGE = (torch.float32, torch.bfloat16)


def mixture(
    dtype: torch.dtype, g: torch.Generator, batch: int, tokens: int, n: int, rank: int, inputs: int, outputs: int, *,
    bias: bool = True, mean: float = 0.0, scale: float = 1.0, factor: float = 1.0,
) -> tuple:  # fmt: skip
    """Arguments whose base product and adapters are each of the order of `scale`."""
    x = normal(g, dtype, batch, tokens, inputs, mean=mean, scale=scale)
    weight = normal(g, dtype, outputs, inputs, scale=max(inputs, 1) ** -0.5)
    b = normal(g, dtype, outputs, scale=scale) if bias else torch.empty(0, dtype=dtype)
    down = normal(g, dtype, n, rank, inputs, scale=max(inputs, 1) ** -0.5)
    up = normal(g, dtype, n, rank, outputs, scale=max(n * rank, 1) ** -0.5)
    return x, weight, b, down, up, torch.randn(batch, n, generator=g), factor


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, weight, bias, down, up, omega, factor = mixture(dtype, g, 3, 11, 2, 8, 24, 20)
    return strided(x), strided(weight), bias.repeat(2)[::2], strided(down), strided(up), strided(omega), factor


def _nan_token(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, *rest = mixture(dtype, g, 2, 9, 2, 4, 33, 20)
    return poison_row(x, 4), *rest


def _exact(dtype: torch.dtype, g: torch.Generator) -> tuple:
    args = mixture(dtype, g, 2, 10, 2, 3, 12, 21)
    return *(integers(g, dtype, *t.shape) for t in args[:5]), integers(g, torch.float32, 2, 2), 0.5


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, tokens, n, rank, inputs, outputs = sizes
            return mixture(dtype, g, batch, tokens, n, rank, inputs, outputs, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    return [  # batch, tokens, adapters, rank, inputs, outputs
        case("small", 3, 5, 2, 4, 12, 10, gradient=True, compiled=True, dtypes=FULL_RANGE),
        case("one", 1, 1, 1, 1, 1, 1),
        case("odd", 3, 7, 3, 5, 37, 51, gradient=True, factor=0.7),
        case("one_token_an_image", 5, 1, 2, 8, 40, 33),
        case("past_a_tile", 1, 130, 2, 8, 72, 136),
        case("tokens_across_images", 5, 43, 2, 8, 33, 40),
        case("one_adapter", 2, 19, 1, 16, 40, 24, factor=2.0),
        case("many_adapters", 2, 9, 8, 8, 24, 70),
        case("no_bias", 2, 9, 2, 4, 31, 30, bias=False),
        case("large_mean", 2, 9, 2, 8, 48, 40, mean=20.0),
        case("large", 2, 9, 2, 8, 24, 24, scale=1e12, dtypes=FULL_RANGE),
        case("tiny", 2, 9, 2, 8, 24, 24, scale=1e-12, dtypes=FULL_RANGE),
        case("no_images", 0, 3, 2, 4, 8, 8, dtypes=FLOAT32),
        case("no_tokens", 2, 0, 2, 4, 8, 8, dtypes=FLOAT32),
        case("no_adapters", 2, 5, 0, 4, 8, 9, dtypes=FLOAT32),
        case("no_rank", 2, 5, 2, 0, 8, 9, dtypes=FLOAT32),
        case("no_inputs", 2, 5, 2, 4, 0, 9, dtypes=FLOAT32),
        case("no_outputs", 2, 5, 2, 4, 8, 0, dtypes=FLOAT32, bias=False),
        Case("strided", _strided),
        Case("nan_token", _nan_token),
        Case("exact", _exact, FLOAT32),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Relative to the size of the terms that a result sums: base product, bias and adapters may cancel."""
    x, weight, bias, down, up, omega, factor = (t.double().abs() if torch.is_tensor(t) else abs(t) for t in args)
    assert got[0].dtype == want[0].dtype
    assert got[0].shape == want[0].shape
    p = torch.einsum("bti,nri->btnr", x, down) * omega[:, None, :, None]
    terms = x @ weight.T + (bias if bias.numel() else 0) + factor * torch.einsum("btnr,nro->bto", p, up)
    difference = (got[0].double() - want[0].double()).abs()
    nan, kind = want[0].isnan(), torch.finfo(got[0].dtype)
    assert torch.equal(got[0].isnan(), nan)
    allowed = rtol * (terms + want[0].double().abs()).masked_fill(nan, 0) + kind.tiny * kind.eps
    wrong = difference.masked_fill(nan, 0) > allowed
    assert not bool(wrong.any()), (
        f"off by up to {float((difference / terms).nan_to_num(0).max()):.3g} of the terms' size"
    )
