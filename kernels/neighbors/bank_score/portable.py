"""All pairs of an image and a stored one at once."""

import torch

from planmill.kernels.neighbors.mutual_score.portable import mean_between, patch_to_images
from planmill.kernels.neighbors.mutual_score.reference import nearby


def bank_score_portable(
    features: torch.Tensor, bank: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool
) -> torch.Tensor:
    """See the reference; in float32."""
    z = features.float()
    near = nearby(z.shape[1], radius, width, z.device) if radius >= 0 else z.new_ones((), dtype=torch.bool)
    a = patch_to_images(z, bank.float(), near)
    return mean_between(a, low, high, bank.shape[0])
