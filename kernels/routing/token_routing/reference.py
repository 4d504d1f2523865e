"""Logits x -> scores p -> choice q -> idx, a: the k best experts of each token and their weights; float64."""

import torch

NOTHING = -torch.inf


def share(x: torch.Tensor) -> torch.Tensor:
    """Softmax of rows: infinite entries share everything, -inf has nothing, also where a row holds nothing else."""
    d = (x - x.detach().amax(1, keepdim=True)).masked_fill(x == torch.inf, 0).masked_fill(x == NOTHING, NOTHING)
    return d.exp() / d.exp().sum(1, keepdim=True).clamp_min(1e-300)


def weigh(
    x: torch.Tensor, idx: torch.Tensor, real: torch.Tensor, score: str, order: str, renormalize: bool, eps: float
) -> torch.Tensor:
    """Weights a [T, k] of the chosen logits; 0 where an expert only fills a place (not `real`)."""
    s = x.gather(1, idx).masked_fill(~real, NOTHING)
    if order == "topk_then_softmax" or (renormalize and score == "softmax" and eps == 0):
        return share(s)
    if score == "softmax":
        a = share(x).gather(1, idx).masked_fill(~real, 0)
        return a / (a.sum(1, keepdim=True) + eps) if renormalize else a
    s = torch.nn.functional.logsigmoid(s)  # a / (sum a + eps) in logarithms: far below zero proportions stay
    return (
        share(torch.cat([s, s.new_full((s.shape[0], 1), eps).log()], 1))[:, : idx.shape[1]] if renormalize else s.exp()
    )


def token_routing_reference(
    logits: torch.Tensor, bias: torch.Tensor, k: int, score: str, order: str, renormalize: bool, eps: float,
    scale: float, groups: int, top_groups: int, mask_with_zero: bool, capacity: int, capacity_group: int, priority: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weights [T, k] float32 and experts [T, k] int32, best first."""
    missing, (tokens, experts) = logits.isnan(), logits.shape
    x = logits.double().masked_fill(missing, NOTHING)
    p = x if order == "topk_then_softmax" else share(x) if score == "softmax" else x.sigmoid()
    q = (p if bias.numel() or groups > 1 else x).detach() + (bias.double() if bias.numel() else 0)
    q = q.masked_fill((x == NOTHING) | q.isnan(), NOTHING)
    if groups > 1:
        best = q.view(tokens, groups, experts // groups).sort(2, descending=True).values[:, :, :2]
        gs = best.masked_fill(best == NOTHING, 0).sum(2).masked_fill(best[:, :, 0] == NOTHING, NOTHING)
        chosen = gs.argsort(dim=1, descending=True, stable=True)[:, :top_groups]
        shut = torch.ones_like(gs, dtype=torch.bool).scatter(1, chosen, False).repeat_interleave(experts // groups, 1)
        q = q.masked_fill(shut & (q != NOTHING), 0.0 if mask_with_zero else NOTHING)
    idx = q.argsort(dim=1, descending=True, stable=True)[:, :k]
    a = weigh(x, idx, q.gather(1, idx) != NOTHING, score, order, renormalize, eps)
    a = (a * scale).float().masked_fill(missing.all(1, keepdim=True), torch.nan)
    keep = within_capacity(idx, a.detach(), experts, capacity, capacity_group, priority) if capacity else idx >= 0
    return torch.where(keep, a, 0), torch.where(keep, idx, -1).int()


def within_capacity(
    idx: torch.Tensor, a: torch.Tensor, experts: int, capacity: int, group: int, priority: str
) -> torch.Tensor:
    """Whether each assignment [T, k] is among the first `capacity` of its expert in its group of tokens."""
    tokens = torch.arange(idx.shape[0], device=idx.device)
    if priority == "score":
        tokens = a.nan_to_num(nan=NOTHING).amax(1).argsort(descending=True, stable=True)
    key = tokens // group * experts + idx[tokens].T if group else idx[tokens].T  # all first choices before any second
    ranked, back = key.flatten().sort(stable=True)
    place = torch.arange(ranked.shape[0], device=idx.device) - torch.searchsorted(ranked, ranked)
    keep = torch.empty_like(back, dtype=torch.bool).scatter(0, back, place < capacity)
    return torch.empty_like(idx, dtype=torch.bool).index_copy(0, tokens, keep.view(idx.shape[1], -1).T)
