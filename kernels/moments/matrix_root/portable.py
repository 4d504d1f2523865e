"""The iteration with a symmetric result, which products in float32 do not give by themselves."""

import torch

from planmill.kernels.moments.matrix_root.reference import matrix_root_reference


def matrix_root_portable(s: torch.Tensor, iterations: int, inverse: bool) -> torch.Tensor:
    """See the reference; in float32."""
    root = matrix_root_reference(s, iterations, inverse)
    return (root + root.mT) / 2
