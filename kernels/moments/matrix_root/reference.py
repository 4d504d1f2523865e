"""The Newton-Schulz iteration for the square root of a matrix and its inverse; float64."""

import torch


def matrix_root_reference(s: torch.Tensor, iterations: int, inverse: bool) -> torch.Tensor:
    """After `iterations` steps, S^(1/2) or S^(-1/2) [B, D, D] float32 of the symmetric part S of s [B, D, D]."""
    s = (s.double() + s.double().mT) / 2
    trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    trace = trace + 0 * s.sum((1, 2), keepdim=True)  # NaN where anything is not finite
    a = torch.where(trace == 0, 1.0, trace)
    identity = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    y, z = s / a, identity.expand_as(s)  # Y_0 = A, Z_0 = I
    for _ in range(iterations):
        m = (3 * identity - z @ y) / 2
        y, z = y @ m, m @ z
    root = z / a.sqrt() if inverse else y * a.sqrt()
    return torch.where(trace == 0, 0.0, root).float()
