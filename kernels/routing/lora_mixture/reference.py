"""y = x W^T + b + sc * [(x Acat^T) * omega] Bcat, float64."""

import torch


def lora_mixture_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, down: torch.Tensor, up: torch.Tensor,
    omega: torch.Tensor, scale: float,
) -> torch.Tensor:  # fmt: skip
    """The mixture [B, N, O] of the dtype of `x`."""
    X, W, A, B = (t.double() for t in (x, weight, down, up))  # [B, N, I], [O, I], [n, r, I], [n, r, O]
    y = X @ W.T
    if bias.numel():
        y = y + bias.double()
    P = torch.einsum("bti,nri->btnr", X, A) * omega.double()[:, None, :, None]
    return (y + scale * torch.einsum("btnr,nro->bto", P, B)).to(x.dtype)
