"""What two streams of attention return."""

from typing import NamedTuple

import torch


class Streams(NamedTuple):
    """Results of the chosen maps, and of queries against keys as the model was trained."""

    new: torch.Tensor
    original: torch.Tensor
