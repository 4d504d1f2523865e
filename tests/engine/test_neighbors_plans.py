"""Plans of small models of the neighbors family: built, proven by their receipt, run at another batch size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Session, build
from planmill.kernels.neighbors import DictionaryLookup, MemoryBank, match_mutually


class Inspector(nn.Module):
    """Tokens looked up twice in a dictionary of good ones, scored against a bank, and matched; [B, 12, 16]."""

    def __init__(self) -> None:
        super().__init__()
        good = torch.randn(40, 16)
        self.first = DictionaryLookup(16, heads=2).fit(good)
        self.second = DictionaryLookup(16, weighting="entmax15", generated=False).fit(good)
        self.bank = MemoryBank.fit(torch.randn(200, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found, distance = self.first(x)
        again, further = self.second(x + found)
        scores, image_scores = self.bank(again)
        matches = match_mutually(x, again, second=(x, found), weights=(0.6, 0.8), ratio=0.98)
        return again, distance, further, scores, image_scores, matches.scores, matches.indices.float()


def inspector() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return (
        Inspector(),
        torch.randn(2, 12, 16),
        {"planmill::dictionary_lookup", "planmill::knn", "planmill::mutual_matching"},
    )


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
