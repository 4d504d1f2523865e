"""Segmented minimum on the GPU: the search of mutual scoring. Offsets stay on the device."""

import torch

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import Match, match_segments


def launch(queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [n, S] float32 and indices [n, S] int32; the contract of `minimize_by_segment`."""
    shape = (queries.shape[0], offsets.shape[0] - 1)
    with torch.cuda.device_of(queries):
        if queries.shape[0] == 0 or database.shape[0] == 0:
            values = torch.full(shape, torch.inf, dtype=torch.float32, device=queries.device)
            return values, torch.full(shape, -1, dtype=torch.int32, device=queries.device)
        values = torch.empty(shape, dtype=torch.float32, device=queries.device)
        indices = torch.empty(shape, dtype=torch.int32, device=queries.device)
        match = Match(queries[None], database[None], offsets.contiguous(), exact=True)
        match_segments(match, values, indices, equal_segments=False)
    return values, indices


STATIC: list[StaticKernel] = []  # the kernels stand in kernels/common/triton_search.py
