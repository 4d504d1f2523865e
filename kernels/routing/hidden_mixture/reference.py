"""Linear maps over Ds shared dimensions and the groups S_t of token t, one slice after the other; float64."""

import torch


def sparse_input_reference(
    x: torch.Tensor, w: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, shared: int, groups: int, c: float
) -> torch.Tensor:
    """y[t] = c (x[t, :Ds] W[:Ds] + sum_{i in S_t} a[t, i] x[t, grp_i] W[grp_i]); x [T, D], w [O, D]."""
    x, w = x.double(), w.double().T
    g = (x.shape[1] - shared) // groups
    y = x[:, :shared] @ w[:shared]
    for t in range(x.shape[0]):
        for i, a in zip(indices[t].tolist(), weights[t].double(), strict=True):
            grp = slice(shared + i * g, shared + (i + 1) * g)
            y[t] += a * (x[t, grp] @ w[grp])
    return c * y


def sparse_output_reference(
    h: torch.Tensor, w: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, shared: int, groups: int, c: float
) -> torch.Tensor:
    """y[t, :Ds] = c h[t] W[:, :Ds]; y[t, grp_i] = c a[t, i] h[t] W[:, grp_i] for i in S_t, otherwise 0; w [D, F]."""
    h, w = h.double(), w.double().T
    g = (w.shape[1] - shared) // groups
    y = h.new_zeros(h.shape[0], w.shape[1])
    y[:, :shared] = h @ w[:, :shared]
    for t in range(h.shape[0]):
        for i, a in zip(indices[t].tolist(), weights[t].double(), strict=True):
            grp = slice(shared + i * g, shared + (i + 1) * g)
            y[t, grp] = a * (h[t] @ w[:, grp])
    return c * y
