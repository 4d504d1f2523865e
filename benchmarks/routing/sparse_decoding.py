"""sparse_decoding against embedding_bag and the dense product. Error: largest absolute one of random tokens."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing import decode_sparsely

from ..cases import Case, Draw, Peer, plain

TOKENS_CHECKED = 64


def make(tokens: int, k: int, latents: int, width: int) -> Callable[[Draw], tuple]:
    """Any rows of the dictionary, distinct or not."""

    def draw_all(draw: Draw) -> tuple:
        indices = torch.randint(0, latents, (tokens, k), generator=draw.generator, dtype=torch.int32)
        return draw.normal(tokens, k), indices.to(draw.device), draw.unit(latents, width), draw.normal(width)

    return draw_all


def embedding_bag(values: torch.Tensor, indices: torch.Tensor, d: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """The library's sum of rows."""
    return F.embedding_bag(indices, d, per_sample_weights=values, mode="sum") + offset


def dense(values: torch.Tensor, indices: torch.Tensor, d: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
    """Dense codes times the dictionary."""
    codes = values.new_zeros(len(values), len(d))
    return codes.scatter_add_(1, indices.long(), values) @ d + offset


def check(args: tuple, found: torch.Tensor) -> float:
    """Random tokens in float64."""
    values, indices, d, offset = args
    rows = torch.randperm(len(values))[:TOKENS_CHECKED].to(d.device)
    want = (values[rows, :, None].double() * d.double()[indices[rows].long()]).sum(1) + offset.double()
    if found.shape != (len(values), d.shape[1]) or not bool(found.isfinite().all()):
        return torch.nan
    return float((found[rows].double() - want).abs().max())


CASES = [
    Case(
        op="sparse_decoding",
        id=f"T{tokens}-k32-D768-M24576",
        make=make(tokens, 32, 24576, 768),
        small=make(64, 8, 512, 128),
        ours=decode_sparsely,
        peers={
            "embedding_bag": Peer(plain(embedding_bag), tolerance=1e-4),
            "scatter, matmul": Peer(plain(dense), tolerance=1e-4),
        },
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=lambda values, indices, d, offset: 2.0 * values.numel() * d.shape[1],
        memory=tokens == 1024,
    )
    for tokens in (1024, 197)
]
