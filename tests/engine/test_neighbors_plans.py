"""Plans of small models of the neighbors family: built, proven by their receipt, run at another batch size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Session, build
from planmill.kernels.neighbors import (
    DictionaryLookup,
    GridIndex,
    KMeans,
    MemoryBank,
    Retriever,
    match_mutually,
    minimize_by_segment,
    retrieve_values,
)


class Inspector(nn.Module):
    """Tokens looked up twice in a dictionary, scored by a bank, by place and by votes, matched; [B, 12, 16]."""

    offsets: torch.Tensor
    places: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        good = torch.randn(40, 16)
        self.first = DictionaryLookup(16, heads=2).fit(good)
        self.second = DictionaryLookup(16, weighting="entmax15", generated=False).fit(good)
        self.bank = MemoryBank.fit(torch.randn(200, 16))
        self.nearby = GridIndex(torch.randn(90, 16), positions=3 * torch.rand(90, 2), radius=1.5)
        self.codes = KMeans(torch.randn(6, 16))
        self.shots = Retriever(torch.randn(30, 16), torch.arange(30) % 4, k=5, weights="softmax")
        self.register_buffer("offsets", torch.tensor([0, 30, 90]))
        self.register_buffer("places", torch.cartesian_prod(torch.arange(3), torch.arange(4)))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found, distance = self.first(x)
        again, further = self.second(x + found)
        scores, image_scores = self.bank(again)
        tokens = again.flatten(0, 1)
        local = self.nearby(tokens, 2, positions=self.places.repeat(x.shape[0], 1))[0]
        parts = minimize_by_segment(tokens, self.nearby.features, self.offsets)[0]
        matches = match_mutually(x, again, second=(x, found), weights=(0.6, 0.8), ratio=0.98)
        pairs = matches.scores, matches.indices.float()
        votes = self.shots(tokens).view(-1, 12, 4)
        means = retrieve_values(x, self.codes.centers, self.codes.centers), self.codes(x).float()
        near = local.view(-1, 12, 2), parts.view(-1, 12, 2)
        return votes, *means, again, distance, further, scores, image_scores, *near, *pairs


def inspector() -> tuple[nn.Module, torch.Tensor, set[str]]:
    ops = {"dictionary_lookup", "knn", "mutual_matching", "constrained_search", "segmented_min"}
    return Inspector(), torch.randn(2, 12, 16), {f"planmill::{name}" for name in ops}


MODELS: list[Callable[[], tuple[nn.Module, torch.Tensor, set[str]]]] = [inspector]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_plan(make: Callable[[], tuple[nn.Module, torch.Tensor, set[str]]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, ops = make()
    plan = build(model.eval(), x, tmp_path / "a.plan", dynamic=DynamicDim("batch", 1, 2, 4))
    assert ops <= set(plan.manifest.ops)
    assert min(output.cosine for output in plan.manifest.receipt.outputs) > 0.999999
    more = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "a.plan")(more), model(more), atol=1e-4, rtol=1e-4)
