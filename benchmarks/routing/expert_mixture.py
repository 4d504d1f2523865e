"""expert_mixture at the shape of a small Mixtral (D = 384, F = 1536, 8 experts, 2 a token, SwiGLU, silu).

On a GPU at that of Qwen1.5-MoE-A2.7B too (D = 2048, F = 1408, 60 experts, 4 a token): 17 MB an expert, so that even one
token's weights are more than a second-level cache holds.

Error: largest difference from float64 over random tokens, as a share of the largest result of its token. Bytes: the
weights of the experts that are used, the tokens and the results. The yardstick reads those weights once and adds them
up: no call that uses them is faster, unless they lie in a cache.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.routing import mix_experts
from planmill.kernels.routing.expert_mixture.reference import expert_mixture_reference

from ..cases import Case, Draw, Goal, Peer, plain

D, HIDDEN, EXPERTS, K = 384, 1536, 8, 2
TOKENS_CHECKED = 32


def mixtral(
    tokens: int, d: int = D, hidden: int = HIDDEN, experts: int = EXPERTS, k: int = K
) -> Callable[[Draw], tuple]:
    """Tokens with distinct random experts and weights that sum to one."""

    def make(draw: Draw) -> tuple:
        scores = torch.randn(tokens, experts, generator=draw.generator).topk(k, 1)
        indices, weights = scores.indices.int().to(draw.device), scores.values.softmax(1).to(draw.device)
        up, down = draw.normal(experts, 2 * hidden, d) * d**-0.5, draw.normal(experts, d, hidden) * hidden**-0.5
        return draw.normal(tokens, d), indices, weights, up, down

    return make


def loop(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Expert by expert: rows selected, two linear layers, `index_add_`."""
    y = torch.zeros(len(x), down.shape[1], dtype=x.dtype, device=x.device)
    for expert in range(len(up)):
        token, slot = (indices == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        gate, rest = F.linear(x[token], up[expert]).chunk(2, 1)
        rows = F.linear(F.silu(gate) * rest, down[expert]) * weights[token, slot, None].to(x.dtype)
        y.index_add_(0, token, rows)
    return y


def grouped(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """Rows sorted by expert, two `grouped_mm`, a weighted sum."""
    chosen, order = indices.flatten().sort(stable=True)
    # Not bincount, which waits for a GPU.
    ends = torch.searchsorted(chosen, torch.arange(len(up), dtype=chosen.dtype, device=x.device), right=True).int()
    gate, rest = F.grouped_mm(x[order // indices.shape[1]], up.transpose(1, 2), offs=ends).chunk(2, 1)
    rows = F.grouped_mm(F.silu(gate) * rest, down.transpose(1, 2), offs=ends)
    terms = torch.empty_like(rows).index_copy_(0, order, rows).view(*indices.shape, -1)
    return (terms * weights[..., None].to(x.dtype)).sum(1)


def scattermoe(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> Callable[[], Any]:
    """Its GLUMLP, which takes the gate second; copying the weights into it is not timed."""
    from scattermoe.mlp import GLUMLP

    experts, d, hidden = down.shape
    layer = GLUMLP(d, hidden, experts, indices.shape[1]).to(x.device, x.dtype).requires_grad_(False)
    gate, rest = up.chunk(2, 1)
    layer.experts.weight.copy_(torch.cat([rest, gate], 1))
    layer.output_experts.weight.copy_(down)
    chosen, shares = indices.long(), weights.to(x.dtype)
    return lambda: layer(x, shares, chosen)


def read_weights(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor
) -> Callable[[], Any]:
    """The sum of the weights in use, as whole numbers of 64 bits: what reading them takes."""
    used = indices.unique().tolist()
    banks = [w[e].flatten().view(torch.int64) for e in used for w in (up, down)]
    return lambda: [bank.sum() for bank in banks]


def check(args: tuple, found: torch.Tensor) -> float:
    """Random tokens against the definition in float64."""
    x, indices, weights, up, down = args
    rows = torch.randperm(len(x))[:TOKENS_CHECKED].to(x.device)
    none = x.new_empty(0).double()
    want = expert_mixture_reference(
        x[rows].double(), indices[rows], weights[rows], up, none, down, none, "silu", False
    )  # fmt: skip
    return float(((found[rows].double() - want).abs().amax(1) / want.abs().amax(1)).max())


def flops(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """Three matrices per assignment."""
    return 2.0 * indices.numel() * (up[0].numel() + down[0].numel())


def moved(x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> float:
    """Weights of the experts in use, tokens and results, once each."""
    active = len(indices.unique()) * (up[0].numel() + down[0].numel())
    return float((active + 2 * x.numel()) * x.element_size() + 2 * indices.nbytes)


PEERS = {
    "loop over experts": Peer(plain(loop), tolerance=5e-2),
    "torch grouped_mm": Peer(plain(grouped), tolerance=5e-2),
    "reading the weights": Peer(read_weights, yardstick=True),
}
DEVICE_PEERS = {
    "torch grouped_mm": PEERS["torch grouped_mm"],
    "scattermoe": Peer(scattermoe, package="scattermoe", tolerance=5e-2),
    "reading the weights": PEERS["reading the weights"],
}
QWEN = {"d": 2048, "hidden": 1408, "experts": 60, "k": 4}


def device_goals(tokens: int) -> tuple[Goal, ...]:
    """Few tokens stream weights, many multiply, one image's are between; asked of bfloat16 on a GPU."""
    if tokens <= 8:
        return (Goal("copy", 0.7, device="cuda"),)
    if tokens == 197:
        return tuple(Goal("ratio", 1.2, name, device="cuda") for name in ("torch grouped_mm", "scattermoe"))
    return (Goal("gemm", 0.6, device="cuda"),) if tokens == 4096 else ()


SHARED: dict[str, Any] = {
    "op": "expert_mixture",
    "ours": mix_experts,
    "check": check,
    "tolerance": {torch.float32: 2e-6, torch.bfloat16: 1e-2},
    "flops": flops,
    "bytes": moved,
}

CASES = [
    *(
        Case(
            id=f"T{tokens}-D384-F1536-E8-k2",
            make=mixtral(tokens),
            small=mixtral(min(tokens, 9), 32, 64),
            peers=PEERS,
            dtypes=(torch.float32, torch.bfloat16),
            calls=8 if tokens == 1 else 1,
            **SHARED,
        )
        for tokens in (1, 8, 64, 197, 785, 1576, 4096)
    ),
    *(
        Case(
            id=f"T{tokens}-D2048-F1408-E60-k4",
            make=mixtral(tokens, **QWEN),
            small=mixtral(min(tokens, 9), 32, 64, 12, 4),
            peers=DEVICE_PEERS,
            dtypes=(torch.bfloat16,),
            devices=("cuda",),
            goals=device_goals(tokens),
            calls=8 if tokens <= 64 else 1,
            **SHARED,
        )
        for tokens in (1, 8, 64, 197, 785, 4096)
    ),
]
