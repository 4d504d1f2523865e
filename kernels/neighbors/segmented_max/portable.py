"""Segments as two spans of 1, 2, 4, ... rows each: no size depends on the offsets, and nothing is scattered."""

import torch

from planmill.kernels.common.portable import levels


def better(
    a: torch.Tensor, a_row: torch.Tensor, b: torch.Tensor, b_row: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The larger of each pair and its row, the first of equals."""
    later = b > a
    return torch.where(later, b, a), torch.where(later, b_row, a_row)


def best_by_segment(score: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The largest score [n, S] of each segment and the first row that has it [n, S] int32, of scores [n, m].

    -inf and row 0 for an empty segment. The best of the spans of 2^j rows that begin at each row come from those of
    2^(j - 1); a segment of 2^j to 2^(j + 1) - 1 rows is covered by the span at its begin and the one at its end.
    """
    rows, begin, length = score.shape[1], offsets[:-1].long(), (offsets[1:] - offsets[:-1]).long()
    position = torch.arange(rows, device=score.device)
    best, row = score, position.int().expand_as(score)
    found = score.new_full((score.shape[0], offsets.shape[0] - 1), -torch.inf)
    at = torch.zeros_like(found, dtype=torch.int32)
    for level in range(levels(rows)):
        span = 1 << level
        first, last = begin.clamp_max(rows - 1), (begin + length - span).clamp(0, rows - 1)
        ends = [t.index_select(1, place) for place in (first, last) for t in (best, row)]
        fits = (length >= span) & (length < 2 * span)
        value, where = better(*ends)
        found, at = torch.where(fits, value, found), torch.where(fits, where, at)
        beyond = (position + span).clamp_max(rows - 1)
        best, row = better(best, row, best.index_select(1, beyond), row.index_select(1, beyond))
    return found, at


def segmented_max_portable(
    queries: torch.Tensor, database: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """See the reference; in float32."""
    q, x = queries.float(), database.float()
    valid = q.isfinite().all(1)[:, None] & x.isfinite().all(1)[None]
    q, x = (torch.where(t.isfinite(), t, 0) for t in (q, x))
    values, indices = best_by_segment(torch.where(valid, q @ x.T, -torch.inf), offsets)
    return values, torch.where(values == -torch.inf, -1, indices)
