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
