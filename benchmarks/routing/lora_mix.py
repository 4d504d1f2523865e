"""lora_mixture at the shapes of a ViT-B qkv layer and of a Swin stage, two adapters of rank 8.

Error: largest difference of random tokens from float64, as a share of their largest result.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing import mix_adapters
from planmill.kernels.routing.lora_mixture.reference import lora_mixture_reference

from ..cases import Case, Draw, Peer

TOKENS_CHECKED = 16


def make(batch: int, tokens: int, inputs: int, outputs: int, rank: int = 8) -> Callable[[Draw], tuple]:
    """Tokens, a base layer and two adapters, weights (1 - alpha, alpha) a sample."""

    def draw_all(draw: Draw) -> tuple:
        alpha = torch.rand(batch, generator=draw.generator) * 1.4 - 0.2
        omega = torch.stack([1 - alpha, alpha], 1).to(draw.device)
        weight, down = draw.normal(outputs, inputs) * inputs**-0.5, draw.normal(2, rank, inputs) * inputs**-0.5
        return (
            draw.normal(batch, tokens, inputs),
            weight,
            draw.normal(outputs),
            down,
            draw.normal(2, rank, outputs),
            omega,
        )

    return draw_all


def published(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, up: torch.Tensor, omega: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """As published: a scaled copy of x for each adapter, two linear layers each, two sums."""
    a, b = list(down), [u.T.contiguous() for u in up]
    factors = omega.to(x.dtype)[:, :, None, None].unbind(1)

    def call() -> torch.Tensor:
        y = F.linear(x, weight, bias)
        for i in range(2):
            y = y + F.linear(F.linear(x * factors[i], a[i]), b[i])
        return y

    return call


def concatenated(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, up: torch.Tensor, omega: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """With care: both adapters in one product each, added to the base in place."""
    a, b = down.flatten(0, 1), up.flatten(0, 1)
    factors = omega.to(x.dtype).repeat_interleave(down.shape[1], 1)[:, None]

    def call() -> torch.Tensor:
        y, p = F.linear(x, weight, bias), F.linear(x, a).mul_(factors)
        y.flatten(0, 1).addmm_(p.flatten(0, 1), b)
        return y

    return call


def base_alone(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, *rest: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """The layer without adapters."""
    return lambda: F.linear(x, weight, bias)


def check(args: tuple, found: torch.Tensor) -> float:
    """Random tokens of a random sample against the definition in float64."""
    x, *rest, omega = args
    i, rows = int(torch.randint(len(x), ())), torch.randperm(x.shape[1])[:TOKENS_CHECKED].to(x.device)
    given = (x[i : i + 1, rows], *rest)
    want = lora_mixture_reference(*(t.double() for t in given), omega[i : i + 1], 1.0)
    return float((found[i, rows].double() - want[0]).abs().max() / want.abs().max())


def flops(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, *rest: torch.Tensor) -> float:
    """The base product, and the adapters' two."""
    ranks = down.shape[0] * down.shape[1]
    return 2.0 * x[..., 0].numel() * (weight.numel() + ranks * sum(weight.shape))


CASES = [
    Case(
        op="lora_mixture",
        id=f"B{batch}-N{tokens}-{inputs}x{outputs}-r8x2",
        make=make(batch, tokens, inputs, outputs),
        small=make(2, 5, 32, 48),
        ours=mix_adapters,
        peers={
            "two scaled copies (published)": Peer(published, tolerance=5e-2),
            "concatenated, in place": Peer(concatenated, tolerance=5e-2),
            "the base alone": Peer(base_alone, yardstick=True),
        },
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
        flops=flops,
        dtypes=(torch.float32, torch.bfloat16),
        calls=8 if batch * tokens == 1 else 1,
    )
    for batch, tokens, inputs, outputs in (
        (1, 1, 768, 2304),
        (1, 197, 768, 2304),
        (8, 197, 768, 2304),
        (64, 49, 384, 1152),
    )
]
