"""Segmented maximum, and minimum, on the GPU: the search of mutual scoring. Offsets stay on the device."""

import torch

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import Match, match_segments


def launch(queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Values [n, S] float32 and indices [n, S] int32; the contract of `maximize_by_segment`."""
    return search(queries, database, offsets, dot=True)


def search(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor, *, dot: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest product, or with `dot` False the smallest distance, of each query and segment; and where it is."""
    shape = (queries.shape[0], offsets.shape[0] - 1)
    with torch.cuda.device_of(queries):
        if queries.shape[0] == 0 or database.shape[0] == 0:
            values = torch.full(shape, -torch.inf if dot else torch.inf, dtype=torch.float32, device=queries.device)
            return values, torch.full(shape, -1, dtype=torch.int32, device=queries.device)
        values = torch.empty(shape, dtype=torch.float32, device=queries.device)
        indices = torch.empty(shape, dtype=torch.int32, device=queries.device)
        match = Match(queries[None], database[None], offsets.contiguous(), exact=True, dot=dot)
        match_segments(match, values, indices, equal_segments=False)
    return values, indices


STATIC: list[StaticKernel] = []  # the kernels stand in kernels/common/triton_search.py
