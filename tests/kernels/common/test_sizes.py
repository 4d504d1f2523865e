"""Sizes in launchers: parts of a whole, and what a symbol is taken for."""

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from planmill.kernels.common.sizes import slabs, tuned_for


@pytest.mark.parametrize(
    ("total", "most", "parts"),
    [(0, 4, []), (1, 4, [(0, 1)]), (4, 4, [(0, 4)]), (5, 4, [(0, 4), (4, 1)]), (9, 3, [(0, 3), (3, 3), (6, 3)])],
)
def test_slabs_make_up_the_whole(total: int, most: int, parts: list[tuple[int, int]]) -> None:
    assert list(slabs(total, most)) == parts


def test_a_symbol_is_one_part_and_stands_for_the_size_that_is_tuned_for() -> None:
    environment, real = ShapeEnv(), torch.empty(7)
    with torch._subclasses.FakeTensorMode(shape_env=environment) as mode:
        context: StatelessSymbolicContext = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        size = mode.from_tensor(real, symbolic_context=context).shape[0]
    assert isinstance(size, torch.SymInt)
    assert tuned_for(size * 2) == 14
    assert tuned_for(3) == 3
    assert not environment.guards
    ((first, count),) = slabs(size, 10)
    assert first == 0
    assert count is size
    assert [str(guard.expr.rhs) for guard in environment.guards] == ["10"]  # the choice is noted: a plan checks it
