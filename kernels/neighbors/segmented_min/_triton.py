"""Segmented minimum on the GPU: see segmented_max."""

import torch

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import SETTLE_C, SETTLE_Q, SETTLE_ROWS, settle_warps
from planmill.kernels.common.triton_search import settle_kernel
from planmill.kernels.neighbors.segmented_max._triton import search


def launch(queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Distances [n, S] float32 and indices [n, S] int32; the contract of `minimize_by_segment`."""
    return search(queries, database, offsets, dot=False)


STATIC = [  # the rest stands in kernels/common/triton_match.py
    StaticKernel(
        settle_kernel,
        pointers={"offsets_ptr": "*i32", "where_ptr": "*i32", "out_where_ptr": "*i32"},
        scalars={"rounding": "fp32"},
        constants={"EXACT": True, "SYMMETRIC": False, "RADIUS": False, "DOT": False, "INDICES": True,
                   "BLOCK_R": SETTLE_ROWS, "BLOCK_C": SETTLE_C, "BLOCK_Q": SETTLE_Q,
                   "x_stride_c": 1, "y_stride_c": 1},
        num_warps=settle_warps(symmetric=False, indices=True, dot=False),
    )
]  # fmt: skip
