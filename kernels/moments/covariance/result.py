"""The result of covariance_moments."""

from typing import NamedTuple

import torch


class CovarianceMoments(NamedTuple):
    """What `covariance_moments` gives.

    Attributes:
        samples: N, the rows of each set.
        mean: [d] or [B, d], float32.
        covariance: [d, d] or [B, d, d], float32, symmetric.
    """

    samples: int
    mean: torch.Tensor
    covariance: torch.Tensor
