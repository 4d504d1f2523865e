"""x[t] = residual[t] + scale * y[row_of_token[t]], in float64."""

import torch


def token_unmerging_reference(
    y: torch.Tensor, row_of_token: torch.Tensor, residual: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """Tokens [B, N, C] of the dtype of y; an empty residual is zero, an empty scale one."""
    row = row_of_token.long()[..., None].expand(-1, -1, y.shape[2])
    x = y.double().gather(1, row)
    if scale.numel():
        x = scale.double() * x
    if residual.numel():
        x = residual.double() + x
    return x.to(y.dtype)
