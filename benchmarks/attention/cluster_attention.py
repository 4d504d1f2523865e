"""Attention in clusters, members included, at d = 64 and w = 64, N / 64 clusters.

Error: largest difference of one random head from float64, as a share of its largest result, over the tokens whose
clusters are clear: a score within 1e-5 of the edge of a cluster may fall either way.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.attention import attend_in_clusters, choose_members

from ..cases import Case, Draw, Goal, Peer, plain

WINDOW, WIDTH = 64, 64
NEAR = 1e-5
FORMULA, WHOLE = "torch topk + gather + softmax", "scaled_dot_product_attention, all tokens"
Args = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, bool]


def make(tokens: int, heads: int, shared: bool) -> Callable[[Draw], Args]:
    """Queries, keys and values of one sequence, unit centroids, and whether queries are keys (and attention causal)."""

    def draw_all(draw: Draw) -> Args:
        q, k, v = (draw.normal(1, heads, tokens, WIDTH) for _ in range(3))
        return q, q if shared else k, v, draw.unit(heads, tokens // WINDOW, WIDTH), shared

    return draw_all


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, means: torch.Tensor, shared: bool) -> torch.Tensor:
    """Both public functions."""
    members = choose_members(q, means, WINDOW)
    if shared:
        return attend_in_clusters(q, k, v, members, causal=True, shared_qk=True)
    return attend_in_clusters(q, k, v, members, choose_members(k, means, WINDOW))


def chosen(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Members [B, H, C, w] by top-k along the tokens."""
    return (F.normalize(x, dim=-1) @ means.mT).topk(WINDOW, dim=2).indices.transpose(2, 3)


def taken(x: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Rows [B, H, C, w, d]."""
    return x.gather(2, members.flatten(2)[..., None].expand(-1, -1, -1, WIDTH)).unflatten(2, members.shape[2:])


def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, means: torch.Tensor, shared: bool) -> torch.Tensor:
    """The published steps, written with care: no copies of masks, counts of one channel."""
    i = chosen(q, means)
    j = i if shared else chosen(k, means)
    keys = F.normalize(k, dim=-1) if shared else k
    logits = taken(q, i) @ taken(keys, j).mT * WIDTH**-0.5
    if shared:
        logits.masked_fill_(i[..., :, None] < j[..., None, :], -torch.finfo(logits.dtype).max)
        logits.diagonal(dim1=-2, dim2=-1).fill_(-5e4)
    rows = (logits.softmax(-1) @ taken(v, j)).flatten(2, 3)
    at = i.flatten(2)[..., None]
    total = torch.zeros_like(v).scatter_add_(2, at.expand_as(rows), rows)
    count = torch.zeros_like(v[..., :1]).scatter_add_(2, at, torch.ones_like(rows[..., :1]))
    return total / (count + 1e-5)


def package(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, means: torch.Tensor, shared: bool) -> Callable:
    """routing-transformer's KmeansAttention with the same centroids (it has a memory slot where it is not shared)."""
    from routing_transformer.routing_transformer import KmeansAttention

    heads, clusters, width = means.shape
    theirs = KmeansAttention(clusters, WINDOW, heads, width, causal=shared, shared_qk=shared).to(q.device, q.dtype)
    theirs.kmeans.means.copy_(means)
    theirs.kmeans.initted.fill_(True)
    theirs.eval().requires_grad_(False)
    return lambda: theirs(q, k, v)[0]


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, means: torch.Tensor, shared: bool) -> torch.Tensor:
    """Every token attends to every (earlier) token."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=shared)


def clear(x: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """[B, H, C] bool: the last member and the first token that is none are well apart."""
    best = (F.normalize(x, dim=-1) @ means.mT).topk(min(WINDOW + 1, x.shape[2]), dim=2).values
    return (best[:, :, WINDOW - 1] - best[:, :, -1] > NEAR) | (x.shape[2] <= WINDOW)


def check(args: tuple, found: torch.Tensor) -> float:
    """One random head in float64."""
    q, k, v, means, shared = args
    h = int(torch.randint(q.shape[1], ()))
    q, k, v, means = q[:, h : h + 1].double(), k[:, h : h + 1].double(), v[:, h : h + 1].double(), means[h].double()
    want = formula(q, k, v, means[None], shared)
    unclear = ~(clear(q, means) & clear(k, means))
    touched = torch.zeros_like(q[..., 0]).scatter_add_(
        2, chosen(q, means[None]).flatten(2), unclear.double().repeat_interleave(WINDOW, 2)
    )
    error = (found[:, h : h + 1].double() - want).abs()[touched == 0]
    return float(error.max() / want.abs().max()) if error.numel() else 0.0


def flops(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, means: torch.Tensor, shared: bool) -> float:
    """Scores of queries (and keys), logits and mixtures; the half that causal attention hides is counted."""
    _, heads, tokens, width = q.shape
    clusters = means.shape[1]
    return heads * width * (2.0 * tokens * clusters * (1 if shared else 2) + 4.0 * clusters * WINDOW**2)


def bench(tokens: int, heads: int, shared: bool, *, goals: bool = False, memory: bool = False) -> Case:
    """One case."""
    peers = {FORMULA: Peer(plain(formula), tolerance=1e-3)}
    if not memory:
        peers["routing-transformer"] = Peer(package, package="routing_transformer", yardstick=not shared)
        peers[WHOLE] = Peer(plain(whole), yardstick=True)
    return Case(
        op="cluster_attention",
        id=f"N{tokens}-H{heads}-w64-d64-{'shared-causal' if shared else 'separate'}{'-memory' if memory else ''}",
        make=make(tokens, heads, shared),
        small=make(128, 2, shared),
        ours=ours,
        peers=peers,
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=flops,
        goals=(Goal("ratio", 3, FORMULA), Goal("ratio", 1, WHOLE)) if goals else (),
        memory=memory,
    )


CASES = [
    bench(4096, 8, False, goals=True),
    bench(4096, 8, True, goals=True),
    bench(1024, 8, False, memory=True),
    bench(4096, 8, False, memory=True),
    bench(16384, 8, False, memory=True),
    bench(65536, 1, False, memory=True),
]
