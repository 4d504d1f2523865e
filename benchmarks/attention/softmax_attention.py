"""attend_by_softmax on views of what one linear layer gives for queries, keys and values, beside PyTorch's attention,
whose result is put side by side by heads too, as the next layer needs it.

Error: largest difference from float64, over the largest result.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.attention import attend_by_softmax

from ..cases import Case, Draw, Goal, Peer

EAGER = "torch attention"
MODELS = {  # heads, tokens, channels of a head
    "vit_small": (6, 197, 64),
    "vit_base_384px": (12, 577, 64),
    "dinov2_small_518px": (6, 1370, 64),
    "digits": (4, 64, 24),
}


def make(batch: int, heads: int, tokens: int, channels: int) -> Callable[[Draw], tuple]:
    """Queries, keys and values, [B, H, N, D], out of [B, N, 3 H D]."""

    def draw_all(draw: Draw) -> tuple:
        qkv = draw.normal(batch, tokens, 3 * heads * channels).unflatten(2, (3, heads, channels))
        return tuple(qkv.permute(2, 0, 3, 1, 4).unbind(0))

    return draw_all


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """All heads side by side."""
    return attend_by_softmax(q, k, v).flatten(2)


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], torch.Tensor]:
    """PyTorch's attention for CPUs and the copy behind it."""
    return lambda: F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def check(args: tuple, found: torch.Tensor) -> float:
    """The first sample in float64."""
    q, k, v = (x[:1].double() for x in args)
    want = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    return float((found[:1] - want).abs().max() / want.abs().max())


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    """Both products."""
    return 2.0 * q[..., 0].numel() * k.shape[2] * (q.shape[3] + v.shape[3])


CASES = [
    Case(
        op="softmax_attention",
        id=f"{name}-{batch}",
        make=make(batch, *sizes),
        small=make(2, 2, 9, 8),
        ours=ours,
        peers={EAGER: Peer(eager, devices=("cpu",))},
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=flops,
        dtypes=(torch.float32,),
        devices=("cpu",),
        goals=(Goal("ratio", 1.0, peer=EAGER),),
        calls=max(1, round(1e9 / (batch * sizes[0] * sizes[1] ** 2 * sizes[2]))),  # some 20 ms: cores wake up slowly
    )
    for name, sizes in MODELS.items()
    for batch in ((1, 16) if name in ("vit_small", "digits") else (1,))
]
