"""What the `portable` form of an op is written with, where its reference cannot be traced with symbolic sizes."""

from collections.abc import Callable, Sequence

import torch

State = Sequence[torch.Tensor]


def scan(
    step: Callable[[State, State, State], tuple[State, State]], state: State, xs: State, constants: State = ()
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """A loop over dimension 0 of `xs` whose length need not be known: one operator in a graph, Scan in ONNX.

    Args:
        step: `step(state, x, constants) -> (state, y)`, with x the slices of `xs`; it uses no tensor but these.
        state: the first state.
        xs: tensors of one length along dimension 0.
        constants: the same in every step.

    Returns:
        The last state, and the ys stacked along dimension 0.
    """

    def flat(*values: torch.Tensor) -> list[torch.Tensor]:
        sliced = len(state) + len(xs)
        after, y = step(values[: len(state)], values[len(state) : sliced], values[sliced:])
        return [*(x.clone() for x in after), *y]

    found = list(torch.ops.higher_order.scan(flat, [x.clone() for x in state], list(xs), tuple(constants)))
    return found[: len(state)], found[len(state) :]


def sum_rows(which: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Sums of rows: [R, C] of x [N, C] float32, row n being part of sum r where `which` [R, N] says so.

    One product instead of a scatter that adds, which TensorRT does not take; what is not finite stays in its own sum.
    """
    unknown = x.isnan()
    infinite = torch.where(x == torch.inf, 1.0, torch.where(x == -torch.inf, -1.0, 0.0))
    parts = [torch.where(x.isfinite(), x, 0), infinite, torch.where(unknown, 2.0, infinite.abs())]
    total, balance, number = (which.to(x.dtype) @ torch.cat(parts, 1)).chunk(3, 1)
    total = torch.where(number + balance > 0, torch.inf, total)
    return torch.where(number - balance > 0, torch.where(number + balance > 0, torch.nan, -torch.inf), total)


def sum_segments(x: torch.Tensor, begin: torch.Tensor, length: torch.Tensor) -> torch.Tensor:
    """Sums of segments: [B, S, C] of the rows `begin` to `begin + length` [B, S] int64 of x [B, M, C].

    Every segment is some spans of 1, 2, 4, ... rows, one for each bit of its length, and those of 2^j rows come from
    those of 2^(j - 1): nothing is scattered, no size depends on the lengths, and what is not finite stays in its sum.
    """
    rows, channels = x.shape[1:]
    position = torch.arange(rows, device=x.device)
    total = x.new_zeros(*begin.shape, channels)
    for level in range(levels(rows)):
        half = length // 2
        odd = length > 2 * half
        place = begin.clamp_max(rows - 1)[..., None].expand(-1, -1, channels)
        total = total + torch.where(odd[..., None], x.gather(1, place), 0)
        begin, length = torch.where(odd, begin + (1 << level), begin), half
        x = x + x.index_select(1, (position + (1 << level)).clamp_max(rows - 1))
    return total


def levels(rows: int) -> int:
    """How many spans of 1, 2, 4, ... there are up to `rows`; where that is not known, as many as an int32 counts."""
    return rows.bit_length() if isinstance(rows, int) else 31
