"""Sizes in launchers: numbers where kernels are started, symbols where a plan is made of the launches."""

from collections.abc import Iterator
from typing import Any


def tuned_for(size: Any) -> int:
    """The size, or where it is a symbol the one that the plan is tuned for: for what changes speed and nothing else."""
    return size if isinstance(size, int) else size.node.hint


def slabs(total: int, most: int) -> Iterator[tuple[int, int]]:
    """(first, count) of the parts of at most `most`, in order, that make up `total`; one part even of a symbol."""
    if 0 < total <= most:
        yield 0, total
        return
    for first in range(0, total, most):
        yield first, min(most, total - first)
