"""Rows of a database in the order of their segment and grid cell, so that what a query may match is a few ranges."""

from typing import NamedTuple

import torch

CELL_BITS = 30  # of all axes together; the segment takes the 31 bits above
AXIS_BITS = {0: 0, 1: 30, 2: 15, 3: 10}  # by number of axes
MARGIN = 2.0**-20  # an edge is longer than the radius by this share: rounding never makes a fourth cell


class Grid(NamedTuple):
    """A database by segment and cell; slot s holds row `rows[s]`.

    Attributes:
        rows: [m] int32.
        positions: [m, p] float64, in the order of `rows`.
        keys: [m] int64, ascending: segment and cell of each slot.
        segments: [m] int64, ascending, or [0] where there are none.
        origin: [p] float64, the lowest coordinates.
        edge: [p] float64, the cell's edges: at least the radius.
    """

    rows: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    segments: torch.Tensor
    origin: torch.Tensor
    edge: torch.Tensor


def _cells(x: torch.Tensor, origin: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    """Cell of each coordinate [n, p], cut off at the ends of the grid: never falls as the coordinate rises."""
    last = float((1 << AXIS_BITS[x.shape[1]]) - 1)
    return ((x - origin) / edge).nan_to_num(0.0, last, 0.0).floor().clamp(0.0, last).long()


def _key(segment: torch.Tensor, cells: list[torch.Tensor]) -> torch.Tensor:
    key = segment
    for cell in cells:
        key = (key << AXIS_BITS[len(cells)]) | cell
    return key if cells else segment << CELL_BITS


def build_grid(positions: torch.Tensor, segments: torch.Tensor | None, radius: float) -> Grid:
    """Sort rows with positions [m, p] float64 and segments [m] by segment and cell.

    Cells are as wide as the radius, or wider where the database spans more of them than the key has bits for.
    """
    m, axes = positions.shape
    rank, ascending = torch.zeros(m, dtype=torch.int64, device=positions.device), positions.new_empty(0).long()
    if segments is not None:
        ascending = segments.long().sort().values
        rank = torch.searchsorted(ascending, segments.long())  # where its segment begins: a name of 31 bits
    origin, edge = positions.new_zeros(axes), positions.new_ones(axes)
    if m > 0 and axes > 0:
        finite = positions.isfinite()
        low = torch.where(finite, positions, torch.inf).amin(0)
        high = torch.where(finite, positions, -torch.inf).amax(0)
        origin = torch.where(low <= high, low, 0.0)
        span = torch.where(low <= high, high - low, 0.0)
        coarse = torch.maximum(low.abs(), high.abs()).nan_to_num(0.0, 0.0, 0.0) * 2.0**-30  # above rounding
        edge = torch.maximum(span / ((1 << AXIS_BITS[axes]) - 1), coarse).clamp_min(radius * (1 + MARGIN))
        edge = torch.where(edge > 0, edge, 1.0)
    cells = list(_cells(positions, origin, edge).unbind(1))
    keys, order = _key(rank, cells).sort(stable=True)
    return Grid(order.int(), positions[order], keys, ascending, origin, edge)


def find_ranges(grid: Grid, positions: torch.Tensor, segments: torch.Tensor | None, radius: float) -> torch.Tensor:
    """Ranges [n, R, 2] int32 of the slots that queries with positions [n, p] float64 and segments [n] may match.

    R is 1, 1, 3 or 9 for 0 to 3 axes: cells along the last axis follow one another. An unused range is empty.
    """
    n, axes = positions.shape
    m = grid.rows.shape[0]
    lines = 3 ** max(axes - 1, 0)
    if m == 0:
        return torch.zeros(n, lines, 2, dtype=torch.int32, device=positions.device)
    rank = torch.zeros(n, dtype=torch.int64, device=positions.device)
    known = positions.isfinite().all(1)
    if segments is not None:
        rank = torch.searchsorted(grid.segments, segments.long())
        known = known & (rank < m) & (grid.segments[rank.clamp_max(m - 1)] == segments)
    reach = radius * (1 + 2.0**-40)  # wider than any rounding of a difference
    low = _cells(positions - reach, grid.origin, grid.edge)
    high = _cells(positions + reach, grid.origin, grid.edge)
    first, last, used = [], [], []
    for line in range(lines):
        cells = [low[:, a] + line // 3**a % 3 for a in range(axes - 1)]
        inside = known
        for a, cell in enumerate(cells):
            inside = inside & (cell <= high[:, a])
        first.append(_key(rank, [*cells, *low.unbind(1)[-1:]]))
        last.append(_key(rank, [*cells, *high.unbind(1)[-1:]]))
        used.append(inside)
    begin = torch.searchsorted(grid.keys, torch.stack(first, 1), out_int32=True)
    end = torch.searchsorted(grid.keys, torch.stack(last, 1), right=True, out_int32=True)
    return torch.where(torch.stack(used, 1)[..., None], torch.stack((begin, end), 2), 0)
