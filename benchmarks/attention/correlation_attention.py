"""Two streams of Crane's E-Attn at 518 x 518 (1370 tokens, ViT-L/14: 16 heads of 64), and D-Attn beside it.

Error: largest difference of one random head (sample) from float64, as a share of its largest result.

65536 tokens are not timed: four maps of one head are 4.4 TFLOP, 40 s a call, and say nothing that 16384 do not.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.attention import attend_by_similarity, attend_in_two_streams

from ..cases import Case, Draw, Goal, Peer, plain

MATERIALISED = "torch, maps materialised"
MAP = 16 * 1370 * 1370 * 4  # bytes of one map


def make(tokens: int, heads: int, width: int = 64) -> Callable[[Draw], tuple]:
    """q, k, v [1, H, N, d] as one projection leaves them."""

    def draw_all(draw: Draw) -> tuple:
        return tuple(draw.normal(1, tokens, 3, heads, width).permute(2, 0, 3, 1, 4).unbind())

    return draw_all


def materialised(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As published: four softmaxes of N x N, three of them summed."""
    c = q.shape[3] ** -0.5
    original = ((q @ k.mT) * c).softmax(-1)
    new = ((v @ v.mT) * c).softmax(-1) + ((k @ k.mT) * c).softmax(-1) + ((q @ q.mT) * c).softmax(-1)
    return new @ v, original @ v


def fused(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch's flash attention, four calls."""
    attend = F.scaled_dot_product_attention
    return attend(q, q, v) + attend(k, k, v) + attend(v, v, v), attend(q, k, v)


def check(args: tuple, found: tuple[torch.Tensor, torch.Tensor]) -> float:
    """One random head in float64, 64 random rows where it has more than 2048."""
    h, tokens = int(torch.randint(args[0].shape[1], ())), args[0].shape[2]
    rows = torch.randperm(tokens)[:64] if tokens > 2048 else torch.arange(tokens)
    q, k, v = (x[0, h].double() for x in args)
    c = q.shape[1] ** -0.5
    maps = {
        name: ((x[rows] @ y.T) * c).softmax(-1) for name, x, y in (("qk", q, k), ("q", q, q), ("k", k, k), ("v", v, v))
    }
    worst = 0.0
    for got, weights in zip(found, (maps["q"] + maps["k"] + maps["v"], maps["qk"]), strict=True):
        want = weights @ v
        worst = max(worst, float((got[0, h, rows].double() - want).abs().max() / want.abs().max()))
    return worst


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Scores of four maps, and the values once for their sum and once for the original."""
    return 2.0 * q.shape[1] * q.shape[2] ** 2 * (4 * q.shape[3] + 2 * v.shape[3])


def make_similarity(places: int, width: int, columns: int) -> Callable[[Draw], tuple]:
    """Features with a common part, as DINO's have, and values of all heads."""

    def draw_all(draw: Draw) -> tuple:
        return draw.normal(1, places, width) + draw.normal(1, 1, width), draw.normal(1, places, columns)

    return draw_all


def similarity_formula(features: torch.Tensor, values: torch.Tensor, heads: int = 16) -> torch.Tensor:
    """As published: one map, repeated for each head."""
    f = F.normalize(features, dim=2)
    S = f @ f.mT
    S = (S - S.mean() * 1.2) * 3.0
    S[S < 0] = -torch.inf
    weights = S[:, None].repeat(1, heads, 1, 1).softmax(-1)
    split = values.unflatten(2, (heads, values.shape[2] // heads)).transpose(1, 2)
    return (weights @ split).transpose(1, 2).flatten(2)


def check_similarity(args: tuple, found: torch.Tensor) -> float:
    """All rows but those with a score within rounding of 0."""
    features, values = (x.double() for x in args)
    f = F.normalize(features, dim=2)
    S = f @ f.mT
    S = (S - S.mean() * 1.2) * 3.0
    sure = (S.abs() > 1e-5).all(2)[0]
    want = S.masked_fill(S < 0, -torch.inf).softmax(-1) @ values
    return float((found.double() - want)[0, sure].abs().max() / want.abs().max())


def similarity_flops(features: torch.Tensor, values: torch.Tensor) -> float:
    """One map for all heads."""
    return 2.0 * features.shape[1] ** 2 * (features.shape[2] + values.shape[2])


def peers(tokens: int) -> dict[str, Peer]:
    """Materialised maps up to 4096 tokens."""
    made: dict[str, Any] = {MATERIALISED: Peer(plain(materialised), tolerance=5e-2)} if tokens <= 4096 else {}
    return made | {"scaled_dot_product_attention": Peer(plain(fused), tolerance=5e-2)}


CASES = [
    Case(
        op="correlation_attention",
        id=f"qq+kk+vv-and-qk-N{tokens}-H{heads}-d64",
        make=make(tokens, heads),
        small=make(100, 2, 16),
        ours=attend_in_two_streams,
        peers=peers(tokens),
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2},
        flops=flops,
        dtypes=(torch.float32, torch.bfloat16) if tokens == 1370 else (torch.float32,),
        # a tenth of what the published form holds at its peak: three maps
        goals=(
            Goal("ratio", 2.0, peer=MATERIALISED, dtype=torch.float32),
            Goal("memory", 0.1 * 3 * MAP, dtype=torch.float32),
        )
        if tokens == 1370
        else (),
        memory=True,
        sweep=("tokens", tokens) if heads == 4 else None,
    )
    for tokens, heads in ((1370, 16), (1024, 4), (4096, 4), (16384, 4))
] + [
    Case(
        op="similarity_attention",
        id="M1369-D768-C1024",
        make=make_similarity(1369, 768, 1024),
        small=make_similarity(100, 16, 32),
        ours=attend_by_similarity,
        peers={"torch, as published": Peer(plain(similarity_formula), tolerance=5e-2)},
        check=check_similarity,
        tolerance={torch.float32: 1e-5},
        flops=similarity_flops,
        memory=True,
    )
]
