"""The result of match_mutually."""

from typing import NamedTuple

import torch


class MutualMatches(NamedTuple):
    """What `match_mutually` gives; all shapes are fixed. Leading [B] only where the maps had it.

    Attributes:
        indices: [B, n] int32: the row of b that row i of a is matched with; -1 where there is no mutual match.
        scores: [B, n] float32: the similarity of row i of a to the row of b nearest to it, mutual or not; -inf where
            there is none.
        nearest: [B, n] int32: the row of b nearest to row i of a, mutual or not; -1 where there is none.
        nearest_back: [B, m] int32: the row of a nearest to row j of b; -1 where there is none.
    """

    indices: torch.Tensor
    scores: torch.Tensor
    nearest: torch.Tensor
    nearest_back: torch.Tensor
