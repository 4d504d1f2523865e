"""From matches to a plan: which tokens each merged row holds, and which row holds each token."""

from typing import NamedTuple

import torch

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.routing.token_matching.partition import TokenPartition


class MergePlan(NamedTuple):
    """What `merge_tokens` and `unmerge_tokens` need. All shapes are fixed by the partition and the number of merges.

    Args:
        row_of_token: [B, N] int32: the merged row that stands for each token.
        offsets: [B, N_m + 1] int32: merged row i of entry b is made of `members[b, offsets[b, i] : offsets[b, i + 1]]`.
        members: [B, N_m + merges] int32: token numbers, a destination's own one before those merged into it.
    """

    row_of_token: torch.Tensor
    offsets: torch.Tensor
    members: torch.Tensor

    @property
    def tokens(self) -> int:
        """N, the number of tokens before merging."""
        return self.row_of_token.shape[1]

    @property
    def rows(self) -> int:
        """N_m, the number of rows after merging."""
        return self.offsets.shape[1] - 1


def check_rows(op: str, name: str, x: torch.Tensor, plan: MergePlan, rows: int, layout: str) -> None:
    """Raise unless `x` [B, rows, C] fits the plan."""
    check_rank(op, name, x, 3, layout)
    check_float(op, name, x)
    batch = plan.offsets.shape[0]
    if x.shape[0] != batch or x.shape[1] != rows:
        raise ValueError(f"{op}: {name} must be [{batch}, {rows}, C] as the plan's, got {list(x.shape)}")
    if x.device != plan.offsets.device:
        raise ValueError(f"{op}: the plan must be on {x.device} like {name}, got {plan.offsets.device}")


def make_plan(similarity: torch.Tensor, position: torch.Tensor, partition: TokenPartition, merges: int) -> MergePlan:
    """The plan of matches [B, n]: the `merges` most similar sources go into their destinations.

    A source whose similarity is NaN counts as the least similar; the lower source goes first on ties.
    """
    batch, sources = position.shape
    device = position.device

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.expand(batch, -1)

    merged, unmerged, target = spread(partition.src), spread(partition.src[:0]), position
    if merges < sources:
        order = (
            torch.where(similarity.isnan(), -torch.inf, similarity).sort(dim=1, descending=True, stable=True).indices
        )
        chosen, rest = order[:, :merges], order[:, merges:]
        if partition.in_order:
            rest = rest.sort(1).values
        merged, unmerged, target = partition.src[chosen], partition.src[rest], position.gather(1, chosen)
    lead = partition.kept.shape[0] + sources - merges
    single = torch.cat([spread(partition.kept), unmerged, spread(partition.dst)], 1)
    rows = single.shape[1] + partition.protected.shape[0]
    own = spread(torch.arange(rows, dtype=torch.int32, device=device))
    # A counting sort by row, stable: lists are in ascending rows, a row's own token first.
    tokens = torch.cat([single, spread(partition.protected), merged], 1)
    keys, order = torch.cat([own, target + lead], 1).sort(dim=1, stable=True)
    offsets = torch.searchsorted(
        keys, spread(torch.arange(rows + 1, dtype=torch.int32, device=device)).contiguous(), out_int32=True
    )
    # Every token is in exactly one of these two lists; then protected tokens stand for themselves.
    row_of_token = torch.zeros(batch, partition.tokens, dtype=torch.int32, device=device)
    row_of_token = row_of_token.scatter(1, single.long(), own[:, : single.shape[1]])
    row_of_token = row_of_token.scatter(1, merged.long(), target + lead)
    if partition.protected.shape[0]:
        row_of_token = row_of_token.index_copy(1, partition.protected.long(), own[:, single.shape[1] :])
    return MergePlan(row_of_token, offsets, tokens.gather(1, order))
