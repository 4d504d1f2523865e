"""Inputs of token_merging that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case


def lists(g: torch.Generator, batch: int, tokens: int, rows: int, listed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Offsets [B, rows + 1] and members [B, listed]: random tokens, some lists empty and some long."""
    cuts = torch.randint(0, listed + 1, (batch, rows - 1), generator=g).sort(1).values
    ends = [torch.zeros(batch, 1), cuts, torch.full((batch, 1), listed)]
    return torch.cat(ends, 1).int(), torch.randint(0, tokens, (batch, listed), generator=g).int()


def one_each(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every row is a token of its own, in reverse order."""
    return torch.arange(tokens + 1).int()[None], torch.arange(tokens - 1, -1, -1).int()[None]


def cases() -> list[Case]:
    return [
        Case(
            "small",
            lambda t, g: (normal(g, t, 2, 9, 8), *lists(g, 2, 9, 4, 9), True),
            gradient=True,
            compiled=True,
        ),
        Case("one", lambda t, g: (normal(g, t, 1, 1, 1), *one_each(1), True)),
        Case("odd", lambda t, g: (normal(g, t, 3, 67, 33), *lists(g, 3, 67, 30, 71), True), gradient=True),
        Case("sum", lambda t, g: (normal(g, t, 2, 40, 100), *lists(g, 2, 40, 20, 40), False), gradient=True),
        Case("across_tiles", lambda t, g: (normal(g, t, 2, 300, 1100), *lists(g, 2, 300, 150, 310), True)),
        Case("one_each", lambda t, g: (normal(g, t, 1, 50, 31), *one_each(50), True)),
        Case("one_long_list", lambda t, g: (normal(g, t, 1, 400, 20), *lists(g, 1, 400, 1, 400), True)),
        Case("no_batch", lambda t, g: (normal(g, t, 0, 9, 8), *lists(g, 0, 9, 4, 9), True)),
        Case("strided", lambda t, g: (strided(normal(g, t, 2, 70, 40)), *lists(g, 2, 70, 30, 70), True)),
        Case("large_mean", lambda t, g: (normal(g, t, 2, 70, 40, mean=300.0), *lists(g, 2, 70, 30, 70), True)),
        Case("nan", lambda t, g: (poison_row(normal(g, t, 2, 70, 40), 5), *lists(g, 2, 70, 30, 70), True)),
        Case("infinity", lambda t, g: (poison_row(normal(g, t, 2, 9, 40), 5, torch.inf), *lists(g, 2, 9, 7, 12), True)),
    ]  # fmt: skip
