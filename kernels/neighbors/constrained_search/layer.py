"""GridIndex: a database sorted by segment and grid cell once, searched many times."""

from collections.abc import Callable

import torch
from torch import nn

from planmill.kernels.neighbors.constrained_search.grid import Grid
from planmill.kernels.neighbors.constrained_search.op import OP, check_radius, grid_of, search_grid


class GridIndex(nn.Module):
    """Nearest neighbours in appearance among the rows near a position and / or in a segment, for large databases.

    The rows' numbers are sorted by segment and by cell of a grid whose edge is the radius; the features stay where they
    are. A call finds the neighbouring cells of each query by binary search and compares only rows within the radius:
    its cost follows the number of rows that match, not m. The results are those of `find_constrained_neighbors`, bit
    for bit.

    Args:
        features: [m, D], float32, bfloat16 or float16; not copied. Kept as a buffer.
        positions: [m, p] with p from 1 to 3, or None; floating point, int32 or int64, kept as float64.
        segments: [m], int32 or int64, or None.
        radius: the largest radius that will be asked for; needed with positions.
        metric: as in `find_neighbors`.

    Shapes: queries [n, D], positions [n, p], segments [n] -> distances [n, k] float32, indices [n, k] int32.

    Source: see `find_constrained_neighbors`.
    """

    features: torch.Tensor
    rows: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    segments: torch.Tensor
    origin: torch.Tensor
    edge: torch.Tensor

    def __init__(
        self,
        features: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        radius: float | None = None,
        metric: str = "l2",
    ) -> None:
        super().__init__()
        self.radius, self.metric = radius, metric
        self.register_buffer("features", features.detach())
        for name, tensor in grid_of(features, positions, segments, radius)._asdict().items():
            self.register_buffer(name, tensor)

    def forward(
        self,
        queries: torch.Tensor,
        k: int = 1,
        *,
        positions: torch.Tensor | None = None,
        segments: torch.Tensor | None = None,
        radius: float | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows of each query; `radius` may be smaller than the index's.

        Raises:
            ValueError: as `find_constrained_neighbors`; a radius above that of the index.
            TypeError: as `find_constrained_neighbors`.
        """
        if radius is not None:
            check_radius(radius)
            if self.radius is None or radius > self.radius:
                raise ValueError(f"{OP}: radius must be at most the index's, {self.radius}, got {radius}")
        grid = Grid(self.rows, self.positions, self.keys, self.segments, self.origin, self.edge)
        within = self.radius if radius is None else radius
        return search_grid(grid, queries, self.features, k, positions, segments, within, self.metric)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "GridIndex":
        """Move everything; a new dtype is for the features only."""
        kept = {name: getattr(self, name) for name in ("positions", "origin", "edge")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            setattr(self, name, tensor.to(getattr(self, name).device))
        return self

    def extra_repr(self) -> str:
        """Size and constraints."""
        (m, d), axes = self.features.shape, self.positions.shape[1]
        return f"rows={m}, width={d}, axes={axes}, radius={self.radius}, metric={self.metric!r}"
