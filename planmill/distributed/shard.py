"""What runs in the process of a shard. It keeps nothing but its block, so a process started again is as good."""

import os
from typing import Protocol

import torch

from planmill.distributed.blocks import Block
from planmill.kernels.neighbors.knn.op import find_neighbors
from planmill.kernels.neighbors.mutual_score.op import score_mutually
from planmill.kernels.neighbors.mutual_score.reference import interval

Range = tuple[int, int]
Place = tuple[int, int]


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

    def minima(
        self, own: Range, others: Block | None, columns: Range, radius: float | None, grid: tuple[int, int] | None
    ) -> tuple[Block, Block]:
        """How far patches are from their nearest in another image, both ways from one visit of each pair.

        Args:
            own: which images here, n of them.
            others: images of another shard; None: those here, each pair of different ones once.
            columns: which of the others, m of them.
            radius, grid: as in `score_mutually`.

        Returns:
            [n, P, m] from here to there, [m, P, n] back; each inf where an image meets itself.
        """
        x, y = self._images[slice(*own)], (self._images if others is None else others.tensor())[slice(*columns)]
        there = torch.full((len(x), x.shape[1], len(y)), torch.inf)
        back = torch.full((len(y), x.shape[1], len(x)), torch.inf)
        for i, one in enumerate(x):
            for j in range(i + 1 if others is None else 0, len(y)):
                # a set of two images: the score of each is the distance from the other
                both = score_mutually(torch.stack([one, y[j]]), 0.0, 1.0, radius=radius, grid=grid, exact=True)
                there[i, :, j], back[j, :, i] = both
                if others is None:
                    there[j, :, i], back[i, :, j] = both[1], both[0]
        return Block.of(there), Block.of(back)

    def means(self, first: int, images: int, low: float, high: float, places: list[Place], *parts: Block) -> Block:
        """Scores [n, P] from the minima against all images of the set.

        The sum runs in the order of the kernel's, in double: nothing else gives the same bits.

        Args:
            first: the number of the first image here.
            images: how many the set has.
            low, high: as in `score_mutually`.
            places: for each part the first image here, and the first of the set, that it is about.
            parts: minima [., P, .].
        """
        table = torch.empty(*self._images.shape[:2], images)
        for (row, column), part in zip(places, parts, strict=True):
            block = part.tensor()
            table[row : row + len(block), :, column : column + block.shape[2]] = block
        own = torch.arange(first, first + len(table))[:, None]
        others = torch.arange(images - 1).expand(len(table), -1)
        others = others + (others >= own)
        ordered = table.gather(2, others[:, None].expand(-1, table.shape[1], -1)).sort(2).values.double()
        begin, end = interval(low, high, images - 1)
        total = torch.zeros(table.shape[:2], dtype=torch.float64)
        for place in range(begin, end):
            total += ordered[..., place]
        return Block.of((total / (end - begin)).float())
