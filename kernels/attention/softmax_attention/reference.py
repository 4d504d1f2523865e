"""y_i = softmax_j(scale <q_i, k_j>) v_j for every head; float64."""

import torch


def softmax_attention_reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    """y [B, N, H, Dv] of q [B, H, N, D], k [B, H, M, D] and v [B, H, M, Dv]; dtype of q."""
    weights = (scale * (q.double() @ k.double().transpose(2, 3))).softmax(3)
    return (weights @ v.double()).transpose(1, 2).contiguous().to(q.dtype)
