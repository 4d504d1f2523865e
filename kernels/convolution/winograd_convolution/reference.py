"""Y = A^T [sum over channels of U * (B^T d B)] A, tile by tile, d a tile of the padded input; float64."""

import torch
from torch.nn import functional as F

from planmill.kernels.convolution.winograd_convolution.transform import SIDE, input_matrix, output_matrix


def winograd_convolution_reference(
    x: torch.Tensor, transformed: torch.Tensor, bias: torch.Tensor, size: int, padding: int
) -> torch.Tensor:
    """y [B, H', W', K] of the dtype of x, from x [B, H, W, C] and U [36, P, C, 16] of K channels."""
    m = SIDE + 1 - size
    height, width = (n + 2 * padding - size + 1 for n in x.shape[1:3])
    rows, columns = (height + m - 1) // m, (width + m - 1) // m
    below, beside = (tiles * m + size - 1 - n - padding for tiles, n in ((rows, x.shape[1]), (columns, x.shape[2])))
    padded = F.pad(x.double(), (0, 0, padding, beside, padding, below))
    b, a = input_matrix(x.device), output_matrix(size, x.device)
    inside = torch.arange(SIDE, device=x.device)
    down = torch.arange(rows, device=x.device)[:, None] * m + inside
    across = torch.arange(columns, device=x.device)[:, None] * m + inside
    d = padded[:, down][:, :, :, across]  # [B, rows, 6, columns, 6, C]
    v = torch.einsum("ui,brisjc,vj->uvbrsc", b, d, b)
    u = transformed.double().unflatten(0, (SIDE, SIDE)).transpose(2, 3).flatten(3)[..., : bias.shape[0]]
    products = torch.einsum("uvbrsc,uvck->uvbrsk", v, u)
    tiles = torch.einsum("iu,uvbrsk,jv->brisjk", a, products, a)
    y = tiles.flatten(3, 4).flatten(1, 2)[:, :height, :width]
    return (y + bias.double()).to(x.dtype)
