"""Mutual scoring of an image set that is cut into shards: the shards' images go round, the minima stay."""

from collections.abc import Sequence

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

    Each of S shards computes the minima of its own patches in all images. In round r shard s reads the block of shard
    s + r, so each block is read by one shard at a time. The minima stay where they are; only scores [N, P] come back.
    A process that is lost is started again from its source and repeats what it had not answered; minima that were
    finished are not computed again. Each pair of images is visited from both sides: twice the products of
    `score_mutually`, where one tile gives both.

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
        count = len(actors)
        parts: list[dict] = [{} for _ in actors]
        for turn in range(count):
            for own, actor in enumerate(actors):
                other = (own + turn) % count
                parts[own][other] = actor.minima.remote(blocks[other], radius, grid)
            calls = [parts[own][(own + turn) % count] for own in range(count)]
            finish(ray, calls)  # no shard reads ahead: blocks are large
        means = [
            actor.means.remote(ends[own], low, high, *(parts[own][other] for other in range(count)))
            for own, actor in enumerate(actors)
        ]
        return torch.cat([block.tensor() for block in collect(ray, means)])
    finally:
        stop_actors(ray, actors)
