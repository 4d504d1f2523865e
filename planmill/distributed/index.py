"""ShardedIndex: nearest neighbours in a database that is cut into shards."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from planmill.distributed.blocks import Block
from planmill.distributed.cluster import (
    ANYWHERE,
    Placement,
    Source,
    collect,
    connect,
    split,
    start_actors,
    stop_actors,
    store,
)
from planmill.distributed.shard import ExactIndex, IndexFactory, RowShard
from planmill.kernels.common.checks import check_choice, check_float, check_rank
from planmill.kernels.neighbors.knn.op import MAX_K
from planmill.kernels.neighbors.knn.reference import METRICS

INT32_ROWS = 2**31 - 1


def merge(found: Sequence[tuple[torch.Tensor, torch.Tensor]], k: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of the lists of several shards, whose rows are numbered through; ties go to the lower row.

    Args:
        found: per shard, in the order of their rows: distances [n, j], nearest first, and rows [n, j], -1 for none.
        k: entries to keep; missing ones are padded.
        metric: "dot": larger is nearer.
    """
    distances, rows = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    # Stable, so that shards in order keep ties in order; a match at distance inf comes before no match at all.
    order = distances.sort(dim=1, stable=True, descending=metric == "dot").indices
    order = order.gather(1, (rows.gather(1, order) < 0).sort(dim=1, stable=True).indices)[:, :k]
    distances, rows = distances.gather(1, order), rows.gather(1, order)
    pad = (0, k - order.shape[1])
    nothing = -torch.inf if metric == "dot" else torch.inf
    return torch.nn.functional.pad(distances, pad, value=nothing), torch.nn.functional.pad(rows, pad, value=-1)


class ShardedIndex:
    """The k nearest rows of a database whose rows live in several processes or machines.

    Each shard answers for its rows, and the lists are merged: what comes out is what `find_neighbors` finds among all
    rows, bit for bit on the CPU. A shard whose process is lost is started again from its source, and asked again.

    Args:
        rows: [m, D], float32, bfloat16 or float16, cut into `shards` parts; or one source per shard, in the order of
            the rows: a tensor, or a callable that returns one (it runs on some node, and again if that is lost).
        shards: number of parts; None: as many as processors allow.
        address: of a Ray cluster; None: one that is started here, or is there already.
        index: builds the index of a shard: `ExactIndex`, a `FaissIndex`, or another `IndexFactory`.
        placement: see there.
        table: one source per shard with more about each row; see `take`.

    Raises:
        ValueError: no rows, shards of different widths, a wrong number of shards.
        TypeError: shards of different dtypes, or of one that is not supported.
        PlanmillError: no Ray, no cluster, too few processors, or a source that cannot be loaded.
    """

    def __init__(
        self,
        rows: torch.Tensor | Sequence[Source],
        *,
        shards: int | None = None,
        address: str | None = None,
        index: IndexFactory = ExactIndex,
        placement: Placement = ANYWHERE,
        table: Sequence[Source] | None = None,
    ) -> None:
        if isinstance(rows, torch.Tensor):
            check_rank("ShardedIndex", "rows", rows, 2, "[m, D]")
        self._ray = connect(address)
        sources = split(self._ray, "ShardedIndex", rows, shards, placement.cpus)
        if table is not None and len(table) != len(sources):
            raise ValueError(f"ShardedIndex: table must have {len(sources)} parts like rows, got {len(table)}")
        # The references are kept: a shard that is started again finds its data through them.
        self._blocks = [store(self._ray, source) for source in sources]
        self._tables = [None] * len(sources) if table is None else [store(self._ray, source) for source in table]
        arguments = [(block, more, index) for block, more in zip(self._blocks, self._tables, strict=True)]
        self.actors = start_actors(self._ray, RowShard, arguments, placement)
        try:
            shapes = collect(self._ray, [actor.shape.remote() for actor in self.actors], placement.start_s)
            self.ends, self.width, self.dtype = check_shards("ShardedIndex", shapes, 2)
        except BaseException:
            self.close()
            raise

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def shards(self) -> int:
        """How many."""
        return len(self.actors)

    def search(
        self, queries: torch.Tensor, k: int, metric: str = "l2", *, exclude_self: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows of each query, as `find_neighbors` gives them.

        Args:
            queries: [n, D], dtype of the rows; on the CPU.
            k: 1 to 1024; with `exclude_self` 1 to 1023.
            metric: "l2", "l2sq", "cosine" or "dot".
            exclude_self: query i does not match row i; needs as many queries as rows.

        Returns:
            distances: [n, k] float32, nearest first.
            indices: [n, k] int32, int64 where there are 2^31 rows or more; ties go to the lower row; -1 for none.

        Raises:
            ValueError: wrong rank or width, k outside its range, an unknown metric.
            TypeError: another dtype than the rows'.
            PlanmillError: a shard is lost for good.
        """
        op = "ShardedIndex.search"
        check_rank(op, "queries", queries, 2, "[n, D]")
        if str(queries.dtype) != self.dtype:
            raise TypeError(f"{op}: queries must be {self.dtype} like the rows, got {queries.dtype}")
        if queries.shape[1] != self.width:
            raise ValueError(f"{op}: queries must be [n, {self.width}] like the rows, got {list(queries.shape)}")
        check_choice(op, "metric", metric, METRICS)
        most = MAX_K - exclude_self
        if not 1 <= k <= most:
            raise ValueError(f"{op}: k must be from 1 to {most}, got {k}")
        if exclude_self and len(queries) != len(self):
            raise ValueError(f"{op}: exclude_self needs as many queries as rows, got {len(queries)} and {len(self)}")
        block = self._ray.put(Block.of(queries))
        answers = collect(self._ray, [actor.search.remote(block, k + exclude_self, metric) for actor in self.actors])
        found = []
        for first, (distances, rows) in zip(self.ends, answers, strict=False):
            own = rows.tensor().long()
            found.append((distances.tensor(), torch.where(own < 0, -1, own + first)))
        distances, indices = merge(found, k + exclude_self, metric)
        if exclude_self:
            itself = indices == torch.arange(len(queries))[:, None]
            others = itself.sort(dim=1, stable=True).indices[:, :k]
            distances, indices = distances.gather(1, others), indices.gather(1, others)
        return distances.contiguous(), indices.to(torch.int32 if len(self) <= INT32_ROWS else torch.int64)

    def take(self, name: str, at: torch.Tensor) -> torch.Tensor:
        """Entries `at` [...] (int64) of the rows ("rows") or of the table ("table"): [..., D] or [..., b].

        Raises:
            ValueError: another name, no table, no entries or one that is no row of the index.
            PlanmillError: a shard is lost for good.
        """
        flat = at.reshape(-1)
        if name not in ("rows", "table") or (name == "table" and self._tables[0] is None):
            raise ValueError(f"ShardedIndex.take: name must be rows, or table where there is one, got {name!r}")
        if len(flat) == 0 or bool(((flat < 0) | (flat >= len(self))).any()):
            raise ValueError(f"ShardedIndex.take: at must hold rows from 0 to {len(self) - 1}, got {flat.tolist()[:8]}")
        calls, places = [], []
        for actor, (first, last) in zip(self.actors, pairwise(self.ends), strict=True):
            here = ((flat >= first) & (flat < last)).nonzero()[:, 0]
            if len(here):
                calls.append(actor.take.remote(name, Block.of(flat[here] - first)))
                places.append(here)
        parts = [block.tensor() for block in collect(self._ray, calls)]
        taken = parts[0].new_empty(len(flat), parts[0].shape[1])
        for here, part in zip(places, parts, strict=True):
            taken[here] = part
        return taken.view(*at.shape, -1)

    def close(self) -> None:
        """End the processes; their data is freed."""
        stop_actors(self._ray, self.actors)
        self.actors, self._blocks, self._tables = [], [], []

    def __enter__(self) -> "ShardedIndex":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def check_shards(op: str, shapes: Sequence[Any], rank: int) -> tuple[list[int], int, str]:
    """Where shards end, beginning with 0, and the width and dtype that all have.

    Raises:
        ValueError: another rank, an empty shard, sizes that differ beyond the first.
        TypeError: dtypes that differ, or one that is not supported.
    """
    ends = [0]
    (_, *rest), dtype = shapes[0]
    for i, (shape, kind) in enumerate(shapes):
        if len(shape) != rank or 0 in shape:
            raise ValueError(f"{op}: shard {i} must have {rank} axes, none of them empty, got {list(shape)}")
        if list(shape[1:]) != rest:
            raise ValueError(
                f"{op}: shard {i} must be [n, {', '.join(map(str, rest))}] like shard 0, got {list(shape)}"
            )
        if kind != dtype:
            raise TypeError(f"{op}: shard {i} must be {dtype} like shard 0, got {kind}")
        ends.append(ends[-1] + shape[0])
    check_float(op, "shards", torch.empty(0, dtype=getattr(torch, dtype.removeprefix("torch."))))
    return ends, rest[-1], dtype
