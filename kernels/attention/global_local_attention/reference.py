"""R = Sbar_L ... Sbar_1, Sbar_l = (S_l + I) / 2, S_l the head mean of the softmax attention of layer l; in float64."""

from collections.abc import Sequence

import torch


def rollout_reference(queries: Sequence[torch.Tensor], keys: Sequence[torch.Tensor], scale: float) -> torch.Tensor:
    """R [B, N, N] of q_l, k_l [B, H, N, d], first layer first."""
    R = torch.eye(queries[0].shape[2], dtype=torch.float64)
    for q, k in zip(queries, keys, strict=True):
        S = (scale * q.double() @ k.double().mT).softmax(-1).mean(1)
        R = (0.5 * S + 0.5 * torch.eye(S.shape[-1], dtype=torch.float64)) @ R
    return R
