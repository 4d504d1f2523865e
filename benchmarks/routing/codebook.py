"""Codebook against the published formulas: LayerNorm, product with codes normalised beforehand, topk, gather, mean.

Error: of random tokens, the largest distance between the result and the mean of the k best codes by float64, relative
to the length of a code, where the k-th and the next code are further apart than float32 can tell.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.routing import Codebook

from ..cases import Case, Draw, Goal, Peer

K = 8
TOKENS_CHECKED = 64


def make(tokens: int, codes: int, width: int) -> Callable[[Draw], tuple]:
    """Gaussian activations and codes."""

    def draw_all(draw: Draw) -> tuple:
        book = Codebook(width, codes, K, "cosine").requires_grad_(False).to(draw.device)
        book.codebook.weight.copy_(draw.normal(codes, width))
        return book, draw.normal(tokens, width)

    return draw_all


def product_topk(book: Codebook, x: torch.Tensor) -> Callable[[], Any]:
    """Codes are normalised beforehand; that is not timed."""
    codes = book.codebook.weight
    unit = F.normalize(codes, dim=1)

    def run() -> torch.Tensor:
        indices = (book.ln(x) @ unit.T).topk(K, dim=1, sorted=False).indices
        return codes[indices].mean(1)

    return run


def check(args: tuple, found: torch.Tensor) -> float:
    """Random tokens against all codes in float64."""
    book, x = args
    rows = torch.randperm(len(x))[:TOKENS_CHECKED].to(x.device)
    codes = book.codebook.weight.double()
    u = F.layer_norm(x[rows].double(), x.shape[1:], eps=1e-5)
    best = (F.normalize(u, dim=1) @ F.normalize(codes, dim=1).T).topk(K + 1, dim=1)
    clear = best.values[:, K - 1] - best.values[:, K] > 1e-6
    wrong = (found[rows].double() - codes[best.indices[:, :K]].mean(1)).norm(dim=1)
    return float(torch.where(clear, wrong, 0).max() / codes.norm(dim=1).mean())


SHARED: dict[str, Any] = {
    "op": "codebook",
    "ours": lambda book, x: book(x),
    "peers": {"torch.mm + topk + mean": Peer(product_topk)},
    "check": check,
    "tolerance": {torch.float32: 1e-5},
    "flops": lambda book, x: 2.0 * len(x) * book.codebook.weight.numel(),
    "small": make(64, 1000, 128),
}

CASES = [
    Case(id="T1024-D768-M10000-k8", make=make(1024, 10000, 768), goals=(Goal("ratio", 3),), memory=True, **SHARED),
    Case(id="T197-D768-M10000-k8", make=make(197, 10000, 768), **SHARED),
    Case(id="T1-D768-M10000-k8", make=make(1, 10000, 768), calls=10, **SHARED),
]
