"""What `stream_with_gates` returns."""

from typing import NamedTuple

import torch


class Streamed(NamedTuple):
    """The tokens' results and what the next ones begin from."""

    out: torch.Tensor
    state: torch.Tensor
