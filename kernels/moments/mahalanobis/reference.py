"""D = |G (x - mu)| with a triangular factor of the precision; float64."""

import torch


def mahalanobis_reference(x: torch.Tensor, mean: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Distances [B, P] float32 of x [B, P, d] from the Gaussians of the positions."""
    positions, d = mean.shape
    rows, columns = torch.tril_indices(d, d, device=x.device).unbind()
    g = torch.zeros(positions, d, d, dtype=torch.float64, device=x.device)
    g[:, rows, columns] = factor.double()  # G = L^-1, S = L L^T
    r = x.double() - mean.double()
    w = torch.einsum("pij,bpj->bpi", g, r)
    return w.norm(dim=2).float()
