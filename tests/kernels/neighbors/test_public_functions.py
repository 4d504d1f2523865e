"""The public functions, checks included, under torch.compile, torch.export and fake tensors."""

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from planmill.kernels.neighbors import (
    MutualScorer,
    find_neighbors,
    maximize_by_segment,
    pool_neighborhood,
    rescore_by_neighbors,
    score_against_bank,
    score_mutually,
)

OFFSETS = torch.tensor([0, 2, 6], dtype=torch.int32)
CALLS: dict[str, Callable] = {
    "score_mutually": score_mutually,
    "score_against_bank": lambda x: score_against_bank(x, x[:2]),
    "find_neighbors": lambda x: find_neighbors(x[0], x[1], 2)[0],
    "maximize_by_segment": lambda x: maximize_by_segment(x[0], x[1], OFFSETS)[0],
    "pool_neighborhood": lambda x: pool_neighborhood(x, (2, 3), 3),
    "rescore_by_neighbors": lambda x: rescore_by_neighbors(x[:, 0, 0], x[:, 0]),
}


class Module(torch.nn.Module):
    """A function as a module."""

    def __init__(self, call: Callable) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


@pytest.fixture
def features(generator: torch.Generator) -> torch.Tensor:
    return torch.randn(5, 6, 8, generator=generator)


@pytest.mark.parametrize("name", CALLS)
def test_compiles_as_one_graph(name: str, features: torch.Tensor) -> None:
    torch.compiler.reset()
    call = CALLS[name]
    torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(features), call(features))


@pytest.mark.parametrize("name", CALLS)
def test_exports(name: str, features: torch.Tensor) -> None:
    program = torch.export.export(Module(CALLS[name]), (features,))
    assert any("planmill" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(features), CALLS[name](features))


def test_fake_tensors_give_shapes_without_work(features: torch.Tensor) -> None:
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(features)
        assert score_mutually(fake).shape == (5, 6)
        assert find_neighbors(fake[0], fake[1], 2)[1].dtype == torch.int32


def test_the_layer_compiles(features: torch.Tensor) -> None:
    torch.compiler.reset()
    scorer = MutualScorer(high=0.6)
    torch.testing.assert_close(torch.compile(scorer, fullgraph=True, backend="aot_eager")(features), scorer(features))
