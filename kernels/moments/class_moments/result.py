"""The result of average_by_class."""

from typing import NamedTuple

import torch


class ClassMoments(NamedTuple):
    """What `average_by_class` gives.

    Attributes:
        counts: [K] int32.
        means: [K, d] float32.
        scatter: [d, d] float32, symmetric: the sum over all labelled rows.
    """

    counts: torch.Tensor
    means: torch.Tensor
    scatter: torch.Tensor
