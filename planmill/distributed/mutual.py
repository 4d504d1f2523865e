"""Mutual scoring of an image set that is cut into shards: the images go half way round, minima come back."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch

from planmill.distributed.cluster import (
    ANYWHERE,
    Placement,
    Source,
    collect,
    connect,
    finish,
    split,
    start_actors,
    stop_actors,
    store,
)
from planmill.distributed.index import check_shards
from planmill.distributed.shard import ImageShard
from planmill.kernels.neighbors.mutual_score.op import check_scoring


def score_mutually_in_shards(
    images: torch.Tensor | Sequence[Source],
    low: float = 0.0,
    high: float = 0.3,
    *,
    radius: float | None = None,
    grid: tuple[int, int] | None = None,
    shards: int | None = None,
    address: str | None = None,
    placement: Placement = ANYWHERE,
) -> torch.Tensor:
    """`score_mutually` of images that live in several processes or machines.

    Each pair of images is visited once, as in `score_mutually`: one tile gives the minima of both. In round r of S / 2
    shard s reads the block of shard s + r, so each block is read by one shard at a time, and keeps the minima of both
    for those who need them; in the last round of an even S each of a pair of shards does half of it. Only scores [N, P]
    come back. A process that is lost is started again from its source and repeats what it had not answered; minima that
    were finished are not computed again.

    Args:
        images: [N, P, C], cut into `shards` parts; or one source per shard, as in `ShardedIndex`.
        low, high, radius, grid: as in `score_mutually`.
        shards, address, placement: as in `ShardedIndex`.

    Returns:
        [N, P] float32: what `score_mutually(..., exact=True)` returns, bit for bit on the CPU.

    Raises:
        ValueError, TypeError: as `score_mutually`, and shards that differ.
        PlanmillError: as `ShardedIndex`, and a shard that is lost for good.

    Source: MuSc (Li et al., ICLR 2024), section 3.2; the shards are ours.
    """
    op = "score_mutually_in_shards"
    if isinstance(images, torch.Tensor):
        check_scoring(op, images, low, high, radius, grid, True)
    ray = connect(address)
    blocks = [store(ray, source) for source in split(ray, op, images, shards, placement.cpus)]
    actors = start_actors(ray, ImageShard, [(block,) for block in blocks], placement)
    try:
        shapes = collect(ray, [actor.shape.remote() for actor in actors], placement.start_s)
        ends, _, dtype = check_shards(op, shapes, 3)
        patches, channels = shapes[0][0][1:]
        one = torch.empty(1, patches, channels, dtype=getattr(torch, dtype.removeprefix("torch.")), device="meta")
        check_scoring(op, one, low, high, radius, grid, True)
        if ends[-1] < 2:
            raise ValueError(f"{op}: needs at least 2 images, got {ends[-1]}")
        parts: list[list[tuple[tuple[int, int], object]]] = [[] for _ in actors]
        for turn in deal([after - before for before, after in pairwise(ends)]):
            calls = []
            for task in turn:
                others = None if task.other == task.own else blocks[task.other]
                call = actors[task.own].minima.options(num_returns=2)
                there, back = call.remote(task.rows, others, task.columns, radius, grid)
                parts[task.own].append(((task.rows[0], ends[task.other] + task.columns[0]), there))
                if others is not None:
                    parts[task.other].append(((task.columns[0], ends[task.own] + task.rows[0]), back))
                calls += [there, back]
            finish(ray, calls)  # no shard reads ahead: blocks are large
        means = [
            actor.means.remote(start, ends[-1], low, high, [place for place, _ in found], *(part for _, part in found))
            for actor, start, found in zip(actors, ends[:-1], parts, strict=True)
        ]
        return torch.cat([block.tensor() for block in collect(ray, means)])
    finally:
        stop_actors(ray, actors)


class Task(NamedTuple):
    """What a shard does in a round.

    Args:
        own: the shard.
        rows: which of its images.
        other: the shard whose images it meets; itself: its pairs.
        columns: which of those.
    """

    own: int
    rows: tuple[int, int]
    other: int
    columns: tuple[int, int]


def deal(sizes: Sequence[int]) -> list[list[Task]]:
    """Rounds of tasks in which shards of these sizes visit each pair of images once, each shard once a round."""
    count = len(sizes)
    turns = [
        [Task(s, (0, sizes[s]), (s + r) % count, (0, sizes[(s + r) % count])) for s in range(count)]
        for r in range((count + 1) // 2)
    ]
    if count % 2 == 0:
        last = []
        for s in range(count // 2):
            other = s + count // 2
            middle = sizes[other] // 2
            last.append(Task(s, (0, sizes[s]), other, (0, middle)))
            last.append(Task(other, (middle, sizes[other]), s, (0, sizes[s])))
        turns.append(last)
    return turns
