"""The three matrices of F(m, r) for tiles of six, and kernels transformed by one of them."""

import torch
from torch.nn import functional as F

SIDE = 6  # of an input tile: m + r - 1
SIZES = (2, 3, 4, 5)  # r
PANEL = 16  # output channels that stand together
_POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # and infinity

# Row i: the coefficients of the product of (x - q) over every point q but the i-th; last, over all five.
_INPUT = (
    (1.0, -1.5, -2.0, 1.5, 1.0, 0.0),
    (0.0, -1.0, 0.5, 2.5, 1.0, 0.0),
    (0.0, 1.0, -2.5, 0.5, 1.0, 0.0),
    (0.0, -2.0, -1.0, 2.0, 1.0, 0.0),
    (0.0, 0.5, -1.0, -0.5, 1.0, 0.0),
    (0.0, 1.0, -1.5, -2.0, 1.5, 1.0),
)


def input_matrix(device: torch.device | None = None) -> torch.Tensor:
    """B^T [6, 6], float64: exact, as its entries are."""
    return torch.tensor(_INPUT, dtype=torch.float64, device=device)


def output_matrix(size: int, device: torch.device | None = None) -> torch.Tensor:
    """A^T [7 - r, 6] for a kernel of r taps, float64: the powers of the points; infinity has the highest one alone."""
    rows = [[p**i for p in _POINTS] + [float(i == SIDE - size)] for i in range(SIDE + 1 - size)]
    return torch.tensor(rows, dtype=torch.float64, device=device)


def kernel_matrix(size: int, device: torch.device | None = None) -> torch.Tensor:
    """G [6, r] for a kernel of r taps, float64: a point's powers over the product of its distances to the others."""
    rows = []
    for p in _POINTS:
        distance = 1.0
        for q in _POINTS:
            distance *= p - q if p != q else 1.0
        rows.append([p**i / distance for i in range(size)])
    rows.append([float(i == size - 1) for i in range(size)])
    return torch.tensor(rows, dtype=torch.float64, device=device)


def transform_weight(weight: torch.Tensor) -> torch.Tensor:
    """Kernels as `convolve_with_winograd` takes them: G g G^T, computed in float64 and rounded once.

    Args:
        weight: [K, C, r, r], r from 2 to 5, as nn.Conv2d has it; any float dtype.

    Returns:
        [36, P, C, 16], float32: output channel k at [:, k // 16, :, k % 16], zeros beyond K.

    Raises:
        ValueError: another shape.

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016), section 4.
    """
    if weight.dim() != 4 or weight.shape[2] != weight.shape[3] or weight.shape[2] not in SIZES:
        raise ValueError(f"transform_weight: weight must be [K, C, r, r] with r from 2 to 5, got {list(weight.shape)}")
    g = kernel_matrix(weight.shape[2], weight.device)
    found = torch.einsum("ai,kcij,bj->abck", g, weight.double(), g).flatten(0, 1).float()
    padded = F.pad(found, (0, -found.shape[2] % PANEL))
    return padded.unflatten(2, (-1, PANEL)).transpose(1, 2).contiguous()
