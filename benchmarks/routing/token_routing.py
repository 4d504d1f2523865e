"""token_routing against what models write out: softmax, topk and a division; DeepSeek-V3's choice limited to groups.

Error: largest difference of a weight from float64; NaN where a token's experts are other than those of float64 and
their offers are not within 1e-6 of each other.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.routing import route_tokens

from ..cases import Case, Draw, Peer, plain

DEEPSEEK: dict[str, Any] = {"score": "sigmoid", "renormalize": True, "eps": 1e-20, "scale": 2.5, "groups": 8,
                            "top_groups": 4}  # fmt: skip


def softmax(tokens: int, experts: int, k: int) -> Callable[[Draw], tuple]:
    """Logits, as a router makes them."""
    return lambda draw: (draw.normal(tokens, experts), k)


def grouped(tokens: int, experts: int, k: int) -> Callable[[Draw], tuple]:
    """Logits and the bias of the choice."""
    return lambda draw: (draw.normal(tokens, experts), k, 0.1 * draw.normal(experts).float())


def ours_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As Mixtral routes."""
    return route_tokens(logits, k, renormalize=True)


def ours_grouped(logits: torch.Tensor, k: int, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As DeepSeek-V3 routes."""
    return route_tokens(logits, k, bias=bias, **DEEPSEEK)


def torch_softmax(logits: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """softmax, topk, division by the sum."""
    weights, indices = logits.float().softmax(1).topk(k)
    return indices, weights / weights.sum(1, keepdim=True)


def torch_grouped(logits: torch.Tensor, k: int, bias: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """sigmoid, two topk for the groups, a mask, topk, gather, division."""
    scores = logits if logits.dtype is torch.float64 else logits.float()
    scores = scores.sigmoid()
    offers = scores + bias
    groups = offers.view(len(logits), DEEPSEEK["groups"], -1).topk(2).values.sum(2)
    chosen = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(DEEPSEEK["top_groups"]).indices, True)
    shut = ~chosen.repeat_interleave(logits.shape[1] // DEEPSEEK["groups"], 1)
    indices = offers.masked_fill(shut, -torch.inf).topk(k).indices
    weights = scores.gather(1, indices)
    return indices, weights / (weights.sum(1, keepdim=True) + DEEPSEEK["eps"]) * DEEPSEEK["scale"]


def check(args: tuple, found: tuple) -> float:
    """All tokens; an order of experts other than that of float64 passes where their weights are equal."""
    logits, k, *bias = args
    if bias:
        indices, weights = torch_grouped(logits.double(), k, *bias)
    else:
        best = logits.double().topk(k)
        indices, weights = best.indices, best.values.softmax(1)
    other = (found[0].long() != indices).any(1)
    if float(other.float().mean()) > 0.02:
        return torch.nan
    return float((found[1].double() - weights)[~other].abs().max())


SHARED: dict[str, Any] = {"op": "token_routing", "check": check, "tolerance": {torch.float32: 2e-6}, "calls": 8}

CASES = [
    *(
        Case(
            id=f"softmax-T{tokens}-E{experts}-k{k}",
            make=softmax(tokens, experts, k),
            small=softmax(9, experts, k),
            ours=ours_softmax,
            peers={"torch softmax + topk": Peer(plain(torch_softmax))},
            **SHARED,
        )
        for tokens, experts, k in ((1, 8, 2), (197, 8, 2), (1576, 8, 2), (197, 60, 4), (4096, 60, 4))
    ),
    *(
        Case(
            id=f"groups-T{tokens}-E256-k8",
            make=grouped(tokens, 256, 8),
            small=grouped(9, 256, 8),
            ours=ours_grouped,
            peers={"torch formula": Peer(plain(torch_grouped))},
            **SHARED,
        )
        for tokens in (1, 197, 1576)
    ),
]
