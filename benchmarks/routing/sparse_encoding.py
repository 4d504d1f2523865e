"""A sparse autoencoder, encoding and decoding together, against the formula with the tokens x latents matrix.

Error: of random tokens' reconstructions against float64, relative to the largest reconstructed value.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.neighbors import find_neighbors
from planmill.kernels.routing import decode_sparsely, encode_sparsely

from ..cases import Case, Draw, Goal, Peer, plain

K, ROOM = 32, 96  # latents kept; room for a number that varies
THRESHOLD = 3.0  # standard deviations of a score: 33 of 24576 latents are active
TOKENS_CHECKED = 48


def make(tokens: int, width: int, latents: int, mode: str = "topk") -> Callable[[Draw], tuple]:
    """Gaussian tokens, unit rows in all directions: the scores are Gaussian too, the hardest to screen."""

    def draw_all(draw: Draw) -> tuple:
        x, bias, offset = draw.normal(tokens, width), 0.1 * draw.normal(latents), draw.normal(width)
        theta = THRESHOLD + 0.1 * draw.normal(latents)
        return x, draw.unit(latents, width), bias, draw.unit(latents, width), offset, theta, mode

    return draw_all


def ours(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, d: torch.Tensor, o: torch.Tensor, theta: torch.Tensor,
         mode: str) -> torch.Tensor:  # fmt: skip
    """Both ops."""
    if mode == "jump_relu":
        values, indices, _ = encode_sparsely(x, w, b, ROOM, mode=mode, threshold=theta)
    else:
        values, indices, _ = encode_sparsely(x, w, b, K, mode=mode)
    return decode_sparsely(values, indices, d, o)


def chosen(h: torch.Tensor, theta: torch.Tensor, mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and indices by topk over all latents."""
    if mode == "abs_topk":
        indices = h.abs().topk(K, dim=1).indices
        return h.gather(1, indices), indices
    if mode == "jump_relu":
        return torch.where(h < theta, 0, h.relu()).topk(ROOM, dim=1)
    return h.relu().topk(K, dim=1)


def formula(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, d: torch.Tensor, o: torch.Tensor, theta: torch.Tensor,
            mode: str) -> torch.Tensor:  # fmt: skip
    """Dense scores, dense codes, dense decoding."""
    h = x @ w.T + b
    if mode == "jump_relu":
        return torch.where(h < theta, 0, h.relu()) @ d + o
    values, indices = chosen(h, theta, mode)
    return torch.zeros_like(h).scatter_(1, indices, values) @ d + o


def careful(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, d: torch.Tensor, o: torch.Tensor, theta: torch.Tensor,
            mode: str) -> torch.Tensor:  # fmt: skip
    """Dense scores, but few rows of the dictionary."""
    values, indices = chosen(F.linear(x, w, b), theta, mode)
    return F.embedding_bag(indices, d, per_sample_weights=values, mode="sum") + o


def nearest(x: torch.Tensor, w: torch.Tensor, *rest: Any) -> Callable[[], Any]:
    """The search of the same screen, without biases and without decoding."""
    return lambda: find_neighbors(x, w, K, "dot")


def check(args: tuple, found: torch.Tensor) -> float:
    """Random tokens in float64."""
    x, *rest, mode = args
    rows = torch.randperm(len(x))[:TOKENS_CHECKED].to(x.device)
    w, b, d, o, theta = (t.double() for t in rest)
    values, indices = chosen(x[rows].double() @ w.T + b, theta, mode)
    want = (values[..., None] * d[indices]).sum(1) + o
    if found.shape != x.shape or not bool(found.isfinite().all()):
        return torch.nan
    return float((found[rows].double() - want).abs().max() / want.abs().max())


def flops(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, d: torch.Tensor, o: torch.Tensor, theta: torch.Tensor,
          mode: str) -> float:  # fmt: skip
    """One inner product per token and latent, and K rows of the dictionary per token."""
    return 2.0 * len(x) * x.shape[1] * (len(w) + K)


FORMULA = "matmul, topk, scatter, matmul"
PEERS = {
    FORMULA: Peer(plain(formula), tolerance=1e-4),
    "linear, topk, embedding_bag": Peer(plain(careful), tolerance=1e-4),
    "find_neighbors, dot": Peer(nearest, yardstick=True),
}
GOALS = (Goal("ratio", 3, FORMULA), Goal("memory", 32 << 20))
SHARED: dict[str, Any] = {
    "op": "sparse_encoding",
    "ours": ours,
    "peers": PEERS,
    "check": check,
    "tolerance": {torch.float32: 1e-5},
    "flops": flops,
}

CASES = [
    Case(
        id=f"{name}-T{tokens}-D768-M24576-k32",
        make=make(tokens, 768, 24576, mode),
        small=make(min(tokens, 64), 128, 2048, mode),
        goals=GOALS if (tokens, mode) == (1024, "topk") else (),
        memory=tokens == 1024,
        **SHARED,
    )
    for name, mode, sizes in (
        ("topk", "topk", (1024, 197, 1)),
        ("abs_topk", "abs_topk", (1024,)),
        ("jump_relu", "jump_relu", (1024, 197)),
    )
    for tokens in sizes
]
