"""attend_linearly: 12 heads of 64 channels, 196 to 65536 tokens, heads as a projection leaves them.

Error: largest difference of one random head from float64, as a share of its largest result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.attention import attend_linearly

from ..cases import Case, Draw, Peer, plain


def make(batch: int, tokens: int, heads: int = 12, width: int = 64, **options: Any) -> Callable[[Draw], tuple]:
    """q, k, v [B, H, N, D] as views of [B, N, H, D]."""

    def draw_all(draw: Draw) -> tuple:
        q, k, v = (draw.normal(batch, tokens, heads, width).transpose(1, 2) for _ in range(3))
        return q, k, v, options.get("causal", False)

    return draw_all


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """The op."""
    return attend_linearly(q, k, v, causal=causal)


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Two einsums and a normaliser; causal: a loop over chunks of 64 tokens."""
    q, k = F.elu(q) + 1, F.elu(k) + 1
    if not causal:
        weights = 1 / (torch.einsum("bhnd,bhd->bhn", q, k.sum(2)) + 1e-6)
        return torch.einsum("bhnd,bhde,bhn->bhne", q, torch.einsum("bhnd,bhne->bhde", k, v), weights)
    state, z, parts = q.new_zeros(()), q.new_zeros(()), []
    for a, b, c in zip(q.split(64, 2), k.split(64, 2), v.split(64, 2), strict=True):
        scores = (a @ b.mT).tril()
        o, total = scores @ c, scores.sum(3, keepdim=True)
        if parts:
            o, total = o + a @ state, total + a @ z
        parts.append(o / (total + 1e-6))
        state, z = state + b.mT @ c, z + b.sum(2)[..., None]
    return torch.cat(parts, 2)


def compiled(*args: Any) -> Callable[[], torch.Tensor]:
    """The formula under torch.compile; compiling is not timed."""
    call = torch.compile(formula)
    call(*args)
    return lambda: call(*args)


def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Ordinary attention of the same sizes: another function, for scale."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


def check(args: tuple, found: torch.Tensor) -> float:
    """One random head in float64."""
    q, k, v, causal = args
    b, h = int(torch.randint(len(q), ())), int(torch.randint(q.shape[1], ()))
    want = formula(*(x[b : b + 1, h : h + 1].double() for x in (q, k, v)), causal)[0, 0]
    return float((found[b, h].double() - want).abs().max() / want.abs().max())


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> float:
    """4 N D E a head; where causal also 2 (D + E) for each pair of tokens of a chunk of 48."""
    return float(q.shape[0] * q.shape[1] * q.shape[2] * (4 * q.shape[3] + causal * 48 * 2) * v.shape[3])


FORMULA = {"torch einsum": Peer(plain(formula), tolerance=5e-2)}
LOOP = {"torch loop over chunks": Peer(plain(formula), tolerance=5e-2)}
COMPILED = {"the same, torch.compile": Peer(compiled, tolerance=5e-2)}
SOFTMAX = {"scaled_dot_product_attention": Peer(plain(softmax), yardstick=True)}

CASES = [
    Case(
        op="linear_attention",
        id=f"B{batch}-N{tokens}-H12-D64" + ("-causal" if causal else ""),
        make=make(batch, tokens, causal=causal),
        small=make(1, 100, 2, 16, causal=causal),
        ours=ours,
        peers={
            **(LOOP if causal else FORMULA),
            **({} if causal else COMPILED),
            **(SOFTMAX if tokens <= 4096 else {}),
        },
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
        flops=flops,
        dtypes=(torch.float32, torch.bfloat16) if tokens == 1024 and not causal else (torch.float32,),
        memory=batch == 1 and tokens >= 1024,
        sweep=None if causal or batch > 1 else ("tokens", tokens),
    )
    for batch, tokens, causal in (
        (1, 196, False),
        (8, 196, False),
        (1, 1024, False),
        (1, 4096, False),
        (1, 16384, False),
        (1, 65536, False),
        (8, 196, True),
        (1, 1024, True),
        (1, 16384, True),
    )
]
