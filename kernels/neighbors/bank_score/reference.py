"""MSM of new images against stored ones, in float64."""

import torch

from planmill.kernels.neighbors.mutual_score.reference import interval, nearby, patch_to_image


def bank_score_reference(
    features: torch.Tensor, bank: torch.Tensor, low: float, high: float, radius: float, width: int, exact: bool
) -> torch.Tensor:
    """Scores [N, P] float32 of `features` [N, P, C] against `bank` [M, P, C]."""
    z, b = features.double(), bank.double()
    near = nearby(z.shape[1], radius, width, z.device) if radius >= 0 else z.new_ones((), dtype=torch.bool)
    begin, end = interval(low, high, len(b))
    scores = [
        torch.stack([patch_to_image(image, other, near) for other in b], 1).sort(1).values[:, begin:end].mean(1)
        for image in z
    ]
    return torch.stack(scores).float() if scores else z.new_empty(z.shape[:2]).float()
