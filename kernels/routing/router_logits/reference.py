"""l[t, e] = sum_d x[t, d] W[e, d] + b[e]; float64."""

import torch


def router_logits_reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Logits [T, E] float32."""
    logits = x.double() @ weight.double().T
    return (logits + bias.double() if bias.numel() else logits).float()
