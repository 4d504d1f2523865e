"""What runs in the process of a shard. It keeps nothing but its block, so a process started again is as good."""

import os
from typing import Protocol

import torch

from planmill.distributed.blocks import Block
from planmill.kernels.neighbors.bank_score.op import score_against_bank
from planmill.kernels.neighbors.knn.op import find_neighbors
from planmill.kernels.neighbors.mutual_score.reference import interval
from planmill.kernels.neighbors.segmented_min.op import minimize_by_segment


class Searcher(Protocol):
    """Finds rows of one shard."""

    def search(self, queries: torch.Tensor, k: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Distances [n, k] float32, nearest first, and rows of the shard [n, k]; inf (or -inf) and -1 for none."""
        ...


class IndexFactory(Protocol):
    """Builds the index of one shard, in the shard's process; pickled on its way there."""

    def __call__(self, rows: torch.Tensor) -> Searcher:
        """The index of `rows` [m, D]."""
        ...


class ExactIndex:
    """No index at all: every row of the shard is screened, by `find_neighbors`."""

    def __init__(self, rows: torch.Tensor) -> None:
        self._rows = rows

    def search(self, queries: torch.Tensor, k: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Searcher`."""
        return find_neighbors(queries, self._rows, k, metric)


class _Process:
    def process(self) -> int:
        """Its number, on its node."""
        return os.getpid()


class RowShard(_Process):
    """Some rows of a database.

    Args:
        rows: [m, D].
        table: [m, b], more about each row; None: nothing.
        index: builds what searches the rows.
        threads: of the kernels.
    """

    def __init__(self, rows: Block, table: Block | None, index: IndexFactory, threads: int) -> None:
        torch.set_num_threads(threads)
        self._rows = rows.tensor()
        self._table = None if table is None else table.tensor()
        self._searcher = index(self._rows)

    def shape(self) -> tuple[tuple[int, ...], str]:
        """Of the rows, and their dtype."""
        return tuple(self._rows.shape), str(self._rows.dtype)

    def search(self, queries: Block, k: int, metric: str) -> tuple[Block, Block]:
        """The k nearest rows, as `Searcher.search`."""
        distances, indices = self._searcher.search(queries.tensor(), k, metric)
        return Block.of(distances), Block.of(indices)

    def take(self, name: str, at: Block) -> Block:
        """Rows of the database ("rows") or of the table ("table")."""
        tensor = self._rows if name == "rows" else self._table
        assert tensor is not None, "made without a table"
        return Block.of(tensor[at.tensor()])


class ImageShard(_Process):
    """Some images [n, P, C] of a set."""

    def __init__(self, images: Block, threads: int) -> None:
        torch.set_num_threads(threads)
        self._images = images.tensor()

    def shape(self) -> tuple[tuple[int, ...], str]:
        """Of the images, and their dtype."""
        return tuple(self._images.shape), str(self._images.dtype)

    def minima(self, others: Block, radius: float | None, grid: tuple[int, int] | None) -> Block:
        """How far each patch is from its nearest in each of `others` [m, P, C]: [n, P, m]."""
        x, y = self._images, others.tensor()
        if radius is None:
            ends = torch.arange(len(y) + 1) * y.shape[1]
            nearest = minimize_by_segment(x.flatten(0, 1), y.flatten(0, 1), ends)[0]
            return Block.of(nearest.view(*x.shape[:2], len(y)))
        # the score against a bank of one image is the distance from that image
        scores = [score_against_bank(x, z[None], 0.0, 1.0, radius=radius, grid=grid, exact=True) for z in y]
        return Block.of(torch.stack(scores, 2))

    def means(self, first: int, low: float, high: float, *parts: Block) -> Block:
        """Scores [n, P] from the minima against all images, shard by shard; the first image here is number `first`.

        The sum runs in the order of the kernel's, in double: nothing else gives the same bits.
        """
        table = torch.cat([part.tensor() for part in parts], 2)
        images = table.shape[2]
        own = torch.arange(first, first + len(table))[:, None]
        others = torch.arange(images - 1).expand(len(table), -1)
        others = others + (others >= own)
        ordered = table.gather(2, others[:, None].expand(-1, table.shape[1], -1)).sort(2).values.double()
        begin, end = interval(low, high, images - 1)
        total = torch.zeros(table.shape[:2], dtype=torch.float64)
        for place in range(begin, end):
            total += ordered[..., place]
        return Block.of((total / (end - begin)).float())
