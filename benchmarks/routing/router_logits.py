"""router_logits against torch's linear, whose order of summation changes with the batch. Error: largest of a logit."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing import score_experts

from ..cases import Case, Draw, Peer, plain


def router(tokens: int, width: int, experts: int) -> Callable[[Draw], tuple]:
    """Gaussian tokens, logits of the order of one."""
    return lambda draw: (draw.normal(tokens, width), draw.normal(experts, width) / width**0.5)


def check(args: tuple, logits: torch.Tensor) -> float:
    """Against float64."""
    x, weight = args
    return float((logits.double() - x.double() @ weight.double().T).abs().max())


CASES = [
    Case(
        op="router_logits",
        id=f"T{tokens}-D384-E{experts}",
        make=router(tokens, 384, experts),
        small=router(5, 32, experts),
        ours=score_experts,
        peers={"torch linear": Peer(plain(F.linear), tolerance=1e-1)},
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5},
        flops=lambda x, weight: 2 * x.shape[0] * x.shape[1] * weight.shape[0],
        dtypes=(torch.float32, torch.bfloat16),
        calls=10,
    )
    for tokens in (1, 197)
    for experts in (8, 64)
]
