"""Each token's place in each cluster, by which it gathers: sums in a fixed order, and no scatter that adds."""

from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.attention.cluster_attention.reference import EPSILON, attended


def cluster_attention_portable(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_members: torch.Tensor, *rest: Any
) -> torch.Tensor:
    """See the reference; in float32."""
    batch, heads, tokens, _ = q.shape
    clusters, window = q_members.shape[2:]
    O = F.pad(attended(q, k, v, q_members, *rest), (0, 0, 0, 1))  # noqa: E741  row `window`: of who is not in it
    place = torch.arange(window, device=q.device).expand(q_members.shape)
    where = place.new_full((batch, heads, clusters, tokens), window).scatter(3, q_members.long(), place)
    total = O.new_zeros(batch, heads, tokens, v.shape[3])
    for c in range(clusters):
        total = total + O[:, :, c].gather(2, where[:, :, c, :, None].expand(-1, -1, -1, v.shape[3]))
    count = (where < window).sum(2)[..., None].to(O.dtype)
    return (total / (count + EPSILON)).to(q.dtype)
