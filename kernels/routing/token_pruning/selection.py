"""Which tokens stay: the best of them (FSVG), or all but the plainly irrelevant (EEVG); and moving them."""

import math

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_choice, check_dtype, check_float, check_rank

ORDERS = ("score", "position")


def select_tokens(scores: torch.Tensor, keep: int | float, *, order: str = "position") -> torch.Tensor:
    """The tokens of highest score, a fixed number of them.

    Args:
        scores: [B, N], float32, bfloat16 or float16, any strides. NaN counts as -inf.
        keep: an int: that many tokens, 0 to N; a float: ceil(keep * N), from above 0 to 1. FSVG keeps 0.7.
        order: "position": in their original order; "score": best first, as FSVG has them.

    Returns:
        [B, K] int32 indices into the N tokens; ties go to the lower index.

    Raises:
        ValueError: wrong rank, a number to keep outside its range, an unknown order.
        TypeError: another dtype.

    Source: FSVG (public code), with order="score".
    """
    op = "select_tokens"
    check_rank(op, "scores", scores, 2, "[B, N]")
    check_float(op, "scores", scores)
    check_choice(op, "order", order, ORDERS)
    tokens = scores.shape[1]
    if isinstance(keep, float) and not 0 < keep <= 1:
        raise ValueError(f"{op}: a share to keep must be above 0 and at most 1, got {keep}")
    if isinstance(keep, int) and not 0 <= keep <= tokens:
        raise ValueError(f"{op}: a number to keep must be 0 to {tokens}, got {keep}")
    count = math.ceil(keep * tokens) if isinstance(keep, float) else keep
    best = torch.where(scores.isnan(), -torch.inf, scores).sort(dim=1, descending=True, stable=True).indices[:, :count]
    return (best if order == "score" else best.sort(dim=1).values).int()


def _sum_around(canvas: torch.Tensor) -> torch.Tensor:
    """Sums over the 3 x 3 neighbourhood within pictures [B, h, w]."""
    h, w = canvas.shape[1:]
    padded = F.pad(canvas, (1, 1, 1, 1))
    return torch.stack([padded[:, y : y + h, x : x + w] for y in range(3) for x in range(3)]).sum(0)


def _smooth(canvas: torch.Tensor) -> torch.Tensor:
    """3 x 3 means of pictures [B, h, w]; a neighbour off the grid counts as the centre."""
    off_the_grid = 9 - _sum_around(torch.ones_like(canvas[:1]))
    return (_sum_around(canvas) + off_the_grid * canvas) / 9


def _coin(n: torch.Tensor, seed: int, share: float) -> torch.Tensor:
    """True for a `share` of the integers `n`, the same ones everywhere: a hash of 32 bits, so that no state is kept."""
    mask = 0xFFFFFFFF
    bits = (n.long() + (seed * 0x9E3779B1 & mask)) & mask
    for multiplier in (0x7FEB352D, 0x5BD1E995):  # below 2^31: the product fits 63 bits
        bits = ((bits ^ (bits >> 16)) * multiplier) & mask
    return (bits ^ (bits >> 15)) < share * 2**32


def eliminate_tokens(
    scores: torch.Tensor,
    grid: tuple[int, int],
    *,
    positions: torch.Tensor | None = None,
    threshold: float = 0.015,
    retention: float = 0.1,
    coupled: bool = False,
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of a picture that stay when those of low score go; how many go depends on the scores.

    Scores are put on the grid, cells without a token get the lowest score, and each becomes the mean of its 3 x 3
    neighbourhood, in which a neighbour off the grid counts as the centre. `R = #{(s - min s) / (max s - min s) <
    threshold}` tokens of lowest s go, ties at the higher index first, except that each of them is spared with
    probability `retention`. Where all scores are equal nothing goes. The sizes of the results do not depend on the
    values: the number that stays is known to the device alone.

    Args:
        scores: [B, N], float32, bfloat16 or float16, any strides; e.g. of `score_by_logits`. NaN counts as the lowest.
        grid: (height, width) of the picture in tokens.
        positions: [B, N] int32 or int64, row-major cell of each token, each cell at most once; -1 (or any value off the
            grid): no token is there. None: N = height * width tokens in order.
        threshold: 0 to 1; published 0.015, in one recipe 0.0015.
        retention: 0 to 1; published 0.1, also at inference; 0 spares none.
        coupled: True: R is the least of the batch, as published, so that all samples keep the same number and a result
            depends on the other samples. False: each sample by itself.
        seed: of the sparing: a token is spared by its rank from the end and the seed alone, so that a call can be
            repeated, and a sample's result does not depend on its place in the batch. Give each layer its own.

    Returns:
        indices: [B, N] int32, ascending: the tokens that stay, then -1.
        lengths: [B] int32: how many stay. The published, shorter sequence of a coupled batch is
            `indices[:, : int(lengths[0])]`, which waits for the device.

    Raises:
        ValueError: wrong rank or shape, an empty grid, a threshold or retention outside 0 to 1.
        TypeError: another dtype.

    Source: EEVG, decoder (public code), where a constant score fails; removing nothing is our choice.
    """
    op = "eliminate_tokens"
    check_rank(op, "scores", scores, 2, "[B, N]")
    check_float(op, "scores", scores)
    (batch, tokens), cells = scores.shape, grid[0] * grid[1]
    if min(grid) < 1 or (positions is None and tokens != cells):
        raise ValueError(f"{op}: grid must hold N = {tokens} tokens, got {grid[0]} x {grid[1]}; or give positions")
    if not (0 <= threshold <= 1 and 0 <= retention <= 1):
        raise ValueError(f"{op}: threshold and retention must be 0 to 1, got {threshold} and {retention}")
    if positions is None:
        positions = torch.arange(tokens, device=scores.device).expand(batch, tokens)
    else:
        check_dtype(op, "positions", positions, torch.int32, torch.int64)
        if positions.shape != scores.shape:
            raise ValueError(f"{op}: positions must be {list(scores.shape)} like scores, got {list(positions.shape)}")
    if batch == 0 or tokens == 0:
        return torch.empty_like(scores, dtype=torch.int32), scores.new_zeros(batch, dtype=torch.int32)
    present = (positions >= 0) & (positions < cells)
    kept = _survivors(scores.detach().float(), positions.long(), present, grid, threshold, retention, coupled, seed)
    order = torch.arange(tokens, device=scores.device)
    order = torch.where(kept, order, tokens).sort(dim=1).values
    return torch.where(order == tokens, -1, order).int(), kept.sum(1).int()


def _survivors(
    p: torch.Tensor, positions: torch.Tensor, present: torch.Tensor, grid: tuple[int, int],
    threshold: float, retention: float, coupled: bool, seed: int,
) -> torch.Tensor:  # fmt: skip
    """[B, N] bool: the tokens that stay."""
    batch, tokens = p.shape
    known = present & ~p.isnan()
    lowest = torch.where(known, p, torch.inf).amin(1, keepdim=True)
    p = torch.where(known, p - lowest, 0.0)  # from the lowest on: a constant is exactly constant after the mean too
    cells = grid[0] * grid[1]
    slot = torch.where(present, positions, cells)  # absent tokens write to a cell of their own, which is cut off
    canvas = p.new_zeros(batch, cells + 1).scatter(1, slot, p)[:, :cells]
    smooth = _smooth(canvas.reshape(batch, *grid)).flatten(1).gather(1, slot.clamp_max(cells - 1))
    low = torch.where(present, smooth, torch.inf).amin(1, keepdim=True)
    span = torch.where(present, smooth, -torch.inf).amax(1, keepdim=True) - low
    graded = (span > 0) & span.isfinite()
    size = (present & graded & ((smooth - low) / torch.where(graded, span, 1.0) < threshold)).sum(1, keepdim=True)
    if coupled:
        size = size.amin(0, keepdim=True)
    order = torch.where(present, smooth, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter(1, order, torch.arange(tokens, device=p.device).expand(batch, tokens))
    from_the_end = present.sum(1, keepdim=True) - 1 - rank
    return present & ((from_the_end >= size) | _coin(from_the_end, seed, retention))


def gather_tokens(x: torch.Tensor, indices: torch.Tensor, *, first: int = 0, count: int | None = None) -> torch.Tensor:
    """The sequence with only the chosen tokens of one of its parts; what stands before and after stays in place.

    `y = [x[:first] | x[first + i] for i in indices | x[first + count:]]`.

    Args:
        x: [B, L, D], any dtype and strides.
        indices: [B, K], int32 or int64, below `count`; -1 gives a zero row.
        first: where the part begins: the number of class or register tokens before it.
        count: tokens of the part; None: up to the end.

    Returns:
        [B, L - count + K, D], dtype of `x`.

    Raises:
        ValueError: wrong rank, batches that differ, a part that is not within the sequence.
        TypeError: indices of another dtype.

    Source: a gather; EEVG and FSVG move their tokens so.
    """
    op = "gather_tokens"
    check_rank(op, "x", x, 3, "[B, L, D]")
    _check_indices(op, indices, x)
    length = x.shape[1]
    count = length - first if count is None else count
    if first < 0 or count < 0 or first + count > length:
        raise ValueError(f"{op}: tokens {first} to {first + count} are not within the {length} of x")
    if count == 0:  # nothing to choose from: only -1 can stand in the indices
        chosen = x.new_zeros(*indices.shape, x.shape[2])
    else:
        part, at = x[:, first : first + count], indices.clamp_min(0).long()[..., None]
        chosen = torch.where(indices[..., None] < 0, 0, part.gather(1, at.expand(-1, -1, x.shape[2])))
    return torch.cat([x[:, :first], chosen, x[:, first + count :]], 1)


def scatter_tokens(x: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    """The chosen tokens back at their places, zeros elsewhere: the inverse of `gather_tokens`.

    Args:
        x: [B, K, D], any dtype and strides.
        indices: [B, K], int32 or int64, below `count`, each at most once; the row of a -1 is dropped.
        count: tokens of the whole sequence.

    Returns:
        [B, count, D], dtype of `x`.

    Raises:
        ValueError: wrong rank, shapes that differ, count < 0.
        TypeError: indices of another dtype.

    Source: EEVG, segmentation head: tokens that were removed give zeros.
    """
    op = "scatter_tokens"
    check_rank(op, "x", x, 3, "[B, K, D]")
    _check_indices(op, indices, x)
    if indices.shape[1] != x.shape[1] or count < 0:
        raise ValueError(
            f"{op}: indices must be {list(x.shape[:2])} and count >= 0, got {list(indices.shape)} and {count}"
        )
    at = torch.where(indices < 0, count, indices).long()[..., None].expand(-1, -1, x.shape[2])
    return x.new_zeros(x.shape[0], count + 1, x.shape[2]).scatter(1, at, x)[:, :count]


def _check_indices(op: str, indices: torch.Tensor, x: torch.Tensor) -> None:
    check_dtype(op, "indices", indices, torch.int32, torch.int64)
    if indices.dim() != 2 or indices.shape[0] != x.shape[0]:
        raise ValueError(f"{op}: indices must be [{x.shape[0]}, K], got {list(indices.shape)}")
