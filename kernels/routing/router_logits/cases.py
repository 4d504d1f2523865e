"""Inputs of router_logits that tests, benchmarks and plan checks share, and how its outputs are compared."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case


def router(dtype: torch.dtype, g: torch.Generator, tokens: int, d: int, experts: int, *, bias: bool = False) -> tuple:
    """Tokens, a weight and perhaps a bias."""
    weight = normal(g, dtype, experts, d, scale=max(d, 1) ** -0.5)
    return normal(g, dtype, tokens, d), weight, normal(g, dtype, experts if bias else 0)


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, weight, bias = router(dtype, g, 9, 40, 10, bias=True)
    return strided(x), strided(weight), bias


def _float32_router(dtype: torch.dtype, g: torch.Generator) -> tuple:
    x, weight, bias = router(dtype, g, 9, 40, 10, bias=True)
    return x, weight.float(), bias.float()


def compare(args: tuple, got: tuple, want: tuple, atol: float, _rtol: float) -> None:
    """Against the absolute values of what is summed: sums of products cancel."""
    x, weight, bias = args
    scale = x.double().nan_to_num(0, 0, 0).abs() @ weight.double().abs().T
    scale = scale + (bias.double().abs() if bias.numel() else 0)
    assert torch.equal(got[0].isnan(), want[0].isnan())
    error = (got[0].double() - want[0].double()).abs().nan_to_num()
    assert bool((error <= atol * scale).all()), f"off by {error.max():.3g}"


def cases() -> list[Case]:
    return [
        Case("small", lambda t, g: router(t, g, 5, 12, 4, bias=True), gradient=True, compiled=True),
        Case("one", lambda t, g: router(t, g, 1, 1, 1)),
        Case("one_token", lambda t, g: router(t, g, 1, 384, 8)),
        Case("across_blocks", lambda t, g: router(t, g, 101, 513, 17, bias=True), gradient=True),
        Case("many_experts", lambda t, g: router(t, g, 50, 70, 130, bias=True)),
        Case("no_tokens", lambda t, g: router(t, g, 0, 12, 4)),
        Case("strided", _strided),
        Case("float32_router", _float32_router),
        Case("ties", lambda t, g: (integers(g, t, 30, 20), integers(g, t, 6, 20), torch.zeros(0, dtype=t))),
        Case("nan", lambda t, g: (poison_row(normal(g, t, 60, 20), 50), *router(t, g, 1, 20, 5)[1:])),
    ]
