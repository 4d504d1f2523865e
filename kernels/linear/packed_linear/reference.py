"""y = act(x W^T + b), W out of its panels; float64."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "none": lambda z: z,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


def packed_linear_reference(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor, activation: str) -> torch.Tensor:
    """y [..., N] of the dtype of x, from x [..., K] and W [P, K, 16] of N output channels."""
    w = packed.double().transpose(1, 2).flatten(0, 1)[: bias.shape[0]]
    return ACTIVATIONS[activation](x.double() @ w.T + bias.double()).to(x.dtype)
