"""Partitions of tokens: the published one bit for bit, its sizes, and what a partition must be."""

from typing import Any

import pytest
import torch

from planmill.kernels.routing import TokenPartition


def looped_partition(frames: int, height: int, width: int) -> tuple[list[int], list[int], list[int]]:
    """src (protected ones left out), dst and protected of FastVGGT, for 5 special tokens a frame and seed 33."""
    generator = torch.Generator().manual_seed(33)
    drawn = torch.randint(4, (frames - 1, height // 2, width // 2), generator=generator)
    frame = 5 + height * width
    tokens = frames * frame
    dst = set(range(frame))
    for f in range(1, frames):
        dst |= {f * frame + i for i in range(5)}
        flat = [  # the pattern, row by row, without gaps between its rows
            int(drawn[f - 1, y // 2, x // 2]) == 2 * (y % 2) + x % 2
            for y in range(2 * (height // 2))
            for x in range(2 * (width // 2))
        ]
        dst |= {f * frame + 5 + i for i, chosen in enumerate(flat) if chosen}
    count = int(tokens * 0.1)
    step = max(1, tokens // count) if count else 1
    protected = list(range(0, tokens, step))[:count]
    src = [t for t in range(tokens) if t not in dst and t not in protected]
    return src, sorted(dst), protected


FRAMES = [(3, 5, 7), (4, 4, 6), (2, 3, 3), (1, 4, 4), (2, 1, 5)]


@pytest.mark.parametrize("size", FRAMES, ids=str)
def test_partition_is_the_published_one(size: tuple[int, int, int]) -> None:
    made = TokenPartition.for_frames(*size)
    src, dst, protected = looped_partition(*size)
    assert made.src.tolist() == src
    assert made.dst.tolist() == dst
    assert made.protected.tolist() == protected
    assert made.limit == int(0.9 * made.tokens)
    assert made is TokenPartition.for_frames(*size), "made once"


@pytest.mark.parametrize(("frames", "sizes"), [(8, (8328, 2840, 832)), (100, (104100, 26484, 10410))])
def test_sizes_of_the_published_setting(frames: int, sizes: tuple[int, int, int]) -> None:
    made = TokenPartition.for_frames(frames, 28, 37)
    assert (made.tokens, made.dst.numel(), made.protected.numel()) == sizes
    assert made.src.numel() < made.limit, "all are merged, nothing is sorted"


def test_unsheared_partition_takes_one_of_each_block() -> None:
    height, width = 5, 7
    made = TokenPartition.for_frames(3, height, width, sheared=False, protect=0)
    mask = torch.zeros(made.tokens, dtype=torch.bool)
    mask[made.dst.long()] = True
    for grid in mask.view(3, -1)[1:, 5:].view(2, height, width):
        blocks = grid[:4, :6].reshape(2, 2, 3, 2).sum((1, 3))
        assert torch.equal(blocks, torch.ones(2, 3, dtype=torch.int64))
        assert not grid[4].any()
        assert not grid[:, 6].any()
    even = TokenPartition.for_frames(3, 4, 6, sheared=False)
    assert torch.equal(even.dst, TokenPartition.for_frames(3, 4, 6).dst), "an even width shears nothing"


def test_partition_without_random_patches() -> None:
    made = TokenPartition.for_frames(3, 4, 4, seed=None, protect=0, special=2)
    assert made.dst.tolist() == [*range(18), 18, 19, 36, 37]
    assert TokenPartition.for_frames(3, 4, 4, seed=1).dst.tolist() != TokenPartition.for_frames(3, 4, 4).dst.tolist()


def numbers(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"src": numbers(0, 1), "dst": numbers(1, 2)}, "in two of"),
        ({"src": numbers(0), "dst": numbers(1)}, "token 2 is in none"),
        ({"src": numbers(0, 1, 2)}, "at least one destination"),
        ({"src": numbers(0, 3), "dst": numbers(1, 2)}, "from 0 to 2"),
        ({"src": torch.tensor([0, 1]), "dst": numbers(2)}, "int32"),
        ({"src": numbers(0), "dst": numbers(1, 2), "protected": numbers(0)}, "protected token is among"),
        ({"src": numbers(0), "dst": numbers(1, 2), "protected": numbers(1, 1)}, "protected twice"),
        ({"src": numbers(0), "dst": numbers(1, 2), "limit": -1}, "limit"),
    ],
    ids=lambda p: p if isinstance(p, str) else "",
)
def test_a_partition_is_checked(parts: dict[str, Any], message: str) -> None:
    empty = torch.empty(0, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        TokenPartition(
            **{"tokens": 3, "src": empty, "dst": empty, "protected": empty, "kept": empty, "limit": 3, **parts}
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((0, 2, 2), "must be positive"), ((2, 0, 2), "must be positive"), ((2, 2, 2), "from 0 to 1")],
    ids=str,
)
def test_sizes_are_checked(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenPartition.for_frames(*arguments, protect=1.5)


def test_an_alternating_partition_has_tokens() -> None:
    with pytest.raises(ValueError, match="tokens must be positive, got 0"):
        TokenPartition.alternating(0)
