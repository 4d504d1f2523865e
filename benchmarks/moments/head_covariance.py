"""Moment probing's cross-covariances, and its head, on ViT-B/16 tokens, against the published steps.

Error: the largest, against float64; columns have length one. Of the head: as a share of the largest logit.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.moments import MomentProbingHead, cross_covariance
from planmill.kernels.moments.head_covariance.reference import head_covariance_reference

from ..cases import Case, Draw, Peer, plain

HEADS, TOKENS, WIDTH = 4, 196, 512


def projected(batch: int, tokens: int, width: int) -> Callable[[Draw], tuple]:
    """Projected tokens, and the norm of the heads."""

    def make(draw: Draw) -> tuple:
        return draw.normal(batch, tokens, width), *(1 + draw.normal(2, width // HEADS).float() / 4).unbind()

    return make


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The public function."""
    return cross_covariance(x, HEADS, norm_weight=weight, norm_bias=bias)


def published(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Pair by pair, both heads of each normalised anew, one number taken from each; in the dtype of x."""
    d = x.shape[2] // HEADS
    heads, maps = x.unflatten(2, (HEADS, d)).permute(2, 0, 1, 3), []
    for q in range(HEADS - 1):
        sides = [F.layer_norm(heads[q + i], (d,), weight.to(x.dtype), bias.to(x.dtype)) for i in (0, 1)]
        a, b = (side - side.mean((1, 2), keepdim=True) for side in sides)
        maps.append(F.normalize(torch.bmm(a.mT, b) / x.shape[1], dim=1))
    return torch.stack(maps, 1)


def careful(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Each head normalised once, all pairs in one batched product."""
    d = x.shape[2] // HEADS
    z = F.layer_norm(x.unflatten(2, (HEADS, d)), (d,), weight.to(x.dtype), bias.to(x.dtype)).transpose(1, 2)
    z = z - z.mean((2, 3), keepdim=True)
    return F.normalize(z[:, :-1].mT @ z[:, 1:] / x.shape[1], dim=2)


def check(args: tuple, result: torch.Tensor) -> float:
    """Two random images."""
    x, weight, bias = args
    chosen = torch.randperm(len(x))[:2].to(x.device)
    truth = head_covariance_reference(x[chosen], weight, bias, HEADS, 1e-5, "scalar", "adjacent", False, True)
    return float((result[chosen].float() - truth).abs().max())


def whole(batch: int, tokens: int, dim: int, hidden: int) -> Callable[[Draw], tuple]:
    """Class tokens, tokens and a head with random weights."""

    def make(draw: Draw) -> tuple:
        head = MomentProbingHead(dim, 1000, hidden=hidden)
        for parameter in head.parameters():
            parameter.data = draw.normal(*parameter.shape) * (
                1 if parameter.dim() == 1 else parameter[0].numel() ** -0.5
            )
        cls, tokens_of = draw.normal(batch, dim), draw.normal(batch, 1 + tokens, dim)
        return cls, tokens_of, head.to(draw.device, draw.dtype).requires_grad_(False)

    return make


def by_formula(cls: torch.Tensor, tokens: torch.Tensor, head: MomentProbingHead) -> torch.Tensor:
    """The published forward pass."""
    maps = head.downblocks[0](published(head.proj(tokens[:, 1:]), head.ln.weight, head.ln.bias))
    return (head.classifier1(cls) + head.classifier2(maps.flatten(1))) / 2


def check_head(args: tuple, result: torch.Tensor) -> float:
    """Two random images, the formula in float64."""
    cls, tokens, head = args
    chosen = torch.randperm(len(cls))[:2].to(cls.device)
    exact = MomentProbingHead(cls.shape[1], 1000, hidden=head.ln.weight.shape[0] * HEADS).to(cls.device).double()
    exact.load_state_dict(head.state_dict())
    truth = by_formula(cls[chosen].double(), tokens[chosen].double(), exact)
    return float((result[chosen].double() - truth).abs().max() / truth.abs().max())


CASES = [
    *(
        Case(
            op="head_covariance",
            id=f"B{batch}-T{TOKENS}-4x128",
            make=projected(batch, TOKENS, WIDTH),
            small=projected(2, 9, 32),
            ours=ours,
            peers={
                "published steps": Peer(plain(published), tolerance=2e-2),
                "careful PyTorch": Peer(plain(careful), tolerance=2e-2),
            },
            check=check,
            tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-5},
            flops=lambda x, weight, bias: 2 * (HEADS - 1) * x.numel() // HEADS * (x.shape[2] // HEADS),
            dtypes=(torch.float32, torch.bfloat16) if batch == 32 else (torch.float32,),
            memory=batch == 32,
        )
        for batch in (1, 32)
    ),
    Case(
        op="head_covariance",
        id="head-ViT-B16-B8",
        make=whole(8, TOKENS, 768, WIDTH),
        small=whole(2, 9, 16, 32),
        ours=lambda cls, tokens, head: head(cls, tokens),
        peers={"published steps": Peer(plain(by_formula))},
        check=check_head,
        tolerance={torch.float32: 1e-4},
        flops=lambda cls, tokens, head: 2 * tokens.numel() * WIDTH + 8 * (HEADS - 1) * 2 * TOKENS * 128 * 128,
    ),
]
