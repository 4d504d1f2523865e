"""O_c = softmax(scale Q_c [mem; K_c]^T + masks) [mem; V_c] per cluster; out[n] = mean of O_c[n] over n's clusters."""

from typing import Any

import torch
from torch.nn import functional as F

LARGEST = torch.finfo(torch.float32).max
SELF = -5e4  # logit of a token with itself, where queries and keys are shared
EPSILON = 1e-5  # of the mean over clusters


def taken(X: torch.Tensor, members: torch.Tensor) -> torch.Tensor:
    """Rows [B, H, C, w, d] of X [B, H, N, d]."""
    at = members.flatten(2)[..., None].expand(-1, -1, -1, X.shape[3])
    return X.gather(2, at).unflatten(2, members.shape[2:])


def attended(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_members: torch.Tensor, k_members: torch.Tensor,
    memory_k: torch.Tensor, memory_v: torch.Tensor, q_mask: torch.Tensor, k_mask: torch.Tensor,
    scale: float, causal: bool, shared_qk: bool,
) -> torch.Tensor:  # fmt: skip
    """O [B, H, C, w, dv] of each cluster's queries."""
    i, j = q_members.long(), k_members.long()  # original indices, [B, H, C, w] and [B, H, C, w']
    K = F.normalize(k.double(), dim=-1) if shared_qk else k.double()
    K, V = (
        torch.cat([m.double().expand(q.shape[0], -1, -1, -1, -1), taken(X, j)], 3)
        for m, X in ((memory_k, K), (memory_v, v.double()))
    )
    S = (scale * taken(q.double(), i) @ K.mT).clamp(-LARGEST, LARGEST)  # [B, H, C, w, m + w']
    hidden = (i[..., :, None] < j[..., None, :]) & causal
    for mask, members, dim in ((q_mask, i, -1), (k_mask, j, -2)):
        if mask.numel():
            kept = mask[:, None, :, None].expand(-1, q.shape[1], -1, -1)
            hidden = hidden | ~taken(kept, members)[..., 0].unsqueeze(dim)
    memory = (memory_k.shape[2], 0)  # never hidden
    S = S.masked_fill(F.pad(hidden, memory), -LARGEST)  # finite: a row that is all hidden is uniform
    if shared_qk:
        S = S.masked_fill(F.pad(i[..., :, None] == j[..., None, :], memory), SELF)
    return torch.where(S.isnan(), -torch.inf, S).softmax(-1) @ V


def cluster_attention_reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_members: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """out [B, H, N, dv], dtype of q; `rest` as in `attended`."""
    O = attended(q, k, v, q_members, *rest)  # noqa: E741
    at = q_members.long().flatten(2)[..., None]
    total = q.new_zeros(*q.shape[:3], v.shape[3], dtype=torch.float64)
    total = total.scatter_add(2, at.expand(-1, -1, -1, v.shape[3]), O.flatten(2, 3))
    count = total.new_zeros(*q.shape[:3], 1).scatter_add(2, at, torch.ones_like(at, dtype=torch.float64))
    return (total / (count + EPSILON)).to(q.dtype)
