"""What k-means found."""

from typing import NamedTuple

import torch


class KMeansResult(NamedTuple):
    """Centres of k-means and the rows' clusters.

    Args:
        centers: [K, D] float32.
        labels: [n] int32, the centre nearest to each row.
        inertia: sum of the squared distances to these.
        iterations: rounds of assignment and update.
    """

    centers: torch.Tensor
    labels: torch.Tensor
    inertia: float
    iterations: int
