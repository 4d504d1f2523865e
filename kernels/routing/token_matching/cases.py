"""Inputs of token_matching that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case


def every(tokens: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every `step`-th token is a destination, the others are sources."""
    position = torch.arange(tokens, dtype=torch.int32)
    return position[position % step > 0], position[position % step == 0]


def _zeros(dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    x = normal(g, dtype, 2, 40, 20)
    x[:, 3:20] = 0
    return x


def _all_nan(dtype: torch.dtype) -> torch.Tensor:
    x = torch.ones(1, 6, 4, dtype=dtype)
    x[:, ::2] = torch.nan  # every destination
    return x


def cases() -> list[Case]:
    floats = (torch.float32, torch.bfloat16)
    return [
        Case("small", lambda t, g: (normal(g, t, 2, 9, 8), *every(9, 3)), compiled=True),
        Case("one", lambda t, g: (normal(g, t, 1, 2, 1), *every(2, 2))),
        Case("odd", lambda t, g: (normal(g, t, 3, 67, 33), *every(67, 2))),
        Case("across_tiles", lambda t, g: (normal(g, t, 1, 1500, 129), *every(1500, 4))),
        Case("many_destinations", lambda t, g: (normal(g, t, 2, 300, 65), *reversed(every(300, 5)))),
        Case("no_tokens", lambda t, g: (normal(g, t, 0, 9, 8), *every(9, 3))),
        Case("no_sources", lambda t, g: (normal(g, t, 2, 9, 8), *every(9, 1))),
        Case("ties", lambda t, g: (integers(g, t, 2, 90, 3), *every(90, 2))),
        Case("copies", lambda t, g: (integers(g, t, 2, 1, 40).repeat(1, 130, 1), *every(130, 2))),
        Case("zeros", lambda t, g: (_zeros(t, g), *every(40, 3))),
        Case("strided", lambda t, g: (strided(normal(g, t, 2, 70, 40)), *every(70, 3))),
        Case("large_mean", lambda t, g: (normal(g, t, 2, 90, 48, mean=30.0), *every(90, 3)), floats[:1]),
        Case("huge", lambda t, g: (normal(g, t, 2, 90, 48, scale=1e30), *every(90, 3)), floats),
        Case("tiny", lambda t, g: (normal(g, t, 2, 90, 48, scale=1e-30), *every(90, 3)), floats),
        Case("nan", lambda t, g: (poison_row(poison_row(normal(g, t, 2, 90, 48), 3), 94), *every(90, 2))),
        Case("infinity", lambda t, g: (poison_row(normal(g, t, 2, 90, 48), 4, torch.inf), *every(90, 2))),
        Case("no_finite_destination", lambda t, g: (_all_nan(t), *every(6, 2))),
    ]


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Similarities close; each position reaches its similarity, and is the lowest one among equal rows."""
    metric, src, dst = args
    similarity, position = got
    assert similarity.dtype == torch.float32
    assert position.dtype == torch.int32
    torch.testing.assert_close(similarity, want[0], atol=atol, rtol=0, equal_nan=True)
    matched = ~want[0].isnan()
    assert bool((position[~matched] == 0).all()), "what cannot be matched goes to the first destination"
    entry, source = matched.nonzero(as_tuple=True)
    chosen = metric[entry, dst[position[matched].long()].long()].double()
    best = metric[entry, dst[want[1][matched].long()].long()].double()
    own = metric[entry, src[source].long()].double()
    reached, most = (torch.nn.functional.cosine_similarity(own, x, dim=1, eps=0) for x in (chosen, best))
    torch.testing.assert_close(reached.nan_to_num(), most.nan_to_num(), atol=atol, rtol=0)
    same = (chosen == best).all(1)
    assert bool((position[matched][same] <= want[1][matched][same]).all()), "a tie went to a higher position"
