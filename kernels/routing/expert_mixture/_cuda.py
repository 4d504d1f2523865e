"""Rows sorted by expert into blocks of one expert each: csrc/cuda/routing/sort_experts.cu, one launch."""

from dataclasses import dataclass

import torch

from planmill.kernels.common import cuda

SHARED_BYTES = 96 << 10  # for the counters; every architecture since sm_80 has as much
MAX_WARPS = 32
NO_ROW = 2**31 - 1  # no row is called that: kernels ask whether a row is below the number of rows


@dataclass(frozen=True)
class Blocks:
    """Rows in blocks of `size`; sizes follow from shapes alone.

    Args:
        rows: [bound * size] int32: the row t * k + j of each place, or R where a block ends early.
        expert: [at least bound] int32: the expert of each block.
        count: int32, the first entry: how many blocks there are; later ones are not written.
        bound: how many there can be at most.
        size: rows of a block.
    """

    rows: torch.Tensor
    expert: torch.Tensor
    count: torch.Tensor
    bound: int
    size: int


def sort_experts(indices: torch.Tensor, experts: int, size: int) -> Blocks:
    """Sort the rows of contiguous `indices` [T, k] (int32, at least one) by expert; `size` is a power of two.

    Raises:
        ValueError: more experts than one warp's counters can be held for, or more rows than an int32 addresses.
    """
    if cuda.is_followed():
        return _sort_with_operators(indices, experts, size)
    rows = indices.numel()
    bound = (rows + min(experts, rows) * (size - 1)) // size
    warps = min(MAX_WARPS, -(-rows // 32), SHARED_BYTES // (4 * experts) - 2)
    if warps < 1:
        most = SHARED_BYTES // 12
        raise ValueError(f"expert_mixture: up must have at most {most} experts on a GPU, got {experts}")
    if bound * size >= 2**31:
        raise ValueError(f"expert_mixture: indices must leave fewer than 2^31 rows in whole blocks, got {bound * size}")
    parts = (bound * size, -(-bound // 4) * 4, 4)  # each begins at 16 bytes: pointers of one kind for every shape
    sorted_rows, expert, count = torch.empty(sum(parts), dtype=torch.int32, device=indices.device).split(parts)
    cuda.launch(
        "routing/sort_experts.cu", "sort_experts", 1, 32 * warps, 4 * experts * (warps + 2),
        indices, sorted_rows, expert, count, rows, experts, size.bit_length() - 1,
    )  # fmt: skip
    return Blocks(sorted_rows, expert, count, bound, size)


def _sort_with_operators(indices: torch.Tensor, experts: int, size: int) -> Blocks:
    """The same blocks by torch's operators, for a plan; what the launch above does not write is any number here."""
    device, rows = indices.device, indices.numel()
    expert = indices.reshape(-1).long()
    expert = torch.where((expert >= 0) & (expert < experts), expert, experts)  # dropped rows come last
    order = expert.argsort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=device).scatter_add_(0, expert, torch.ones_like(expert))
    blocks = ((counts + size - 1) // size)[:experts]
    last = blocks.cumsum(0)
    bound = (rows + experts * (size - 1)) // size
    # From a row's place among all sorted rows to its place in its expert's blocks; dropped rows have none.
    shift = torch.cat([(last - blocks) * size - (counts.cumsum(0) - counts)[:experts], counts[:1]])
    owner = expert[order]
    place = torch.where(owner < experts, shift[owner] + torch.arange(rows, device=device), bound * size)
    listed = torch.full((bound * size + 1,), NO_ROW, dtype=torch.int32, device=device)
    listed = listed.scatter(0, place, order.int())[: bound * size]
    ends = (last <= torch.arange(bound, device=device)[:, None]).sum(1)
    return Blocks(listed, ends.clamp_max(experts - 1).int(), last[-1:].int(), bound, size)
