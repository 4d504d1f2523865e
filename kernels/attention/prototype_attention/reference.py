"""a[n, h, m] = relu(tau_h <q_nh, k_hm>) of unit q and k, without normalisation; out = a R + b, R the folded values."""

import torch
from torch.nn import functional as F


def prototype_attention_reference(
    q: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, tau: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """[B, N, C], dtype of q."""
    unit_q = F.normalize(q.double(), dim=3, eps=1e-12)  # [B, N, H, d]
    unit_k = F.normalize(keys.double(), dim=3, eps=1e-12)  # [B, H, M, d]
    a = torch.relu(torch.einsum("bnhd,bhmd->bnhm", unit_q, unit_k) * tau.double()[:, None])
    return (a.flatten(2) @ table.double() + bias.double()).to(q.dtype)
