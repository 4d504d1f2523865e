"""A plan that the tests of serving share, and the requests they send."""

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Plan, build


class Judge(nn.Module):
    """float32 [B, 3, 8, 8] -> float32 scores [B, 4], int64 label [B]."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(192, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.head(x.flatten(1))
        return {"scores": scores, "label": scores.argmax(1)}


@pytest.fixture(scope="session")
def judge() -> nn.Module:
    torch.manual_seed(0)
    return Judge().eval()


@pytest.fixture(scope="session")
def judge_plan(tmp_path_factory: pytest.TempPathFactory, judge: nn.Module) -> Plan:
    path = tmp_path_factory.mktemp("serving") / "judge.plan"
    return build(judge, torch.randn(2, 3, 8, 8), path, dynamic=DynamicDim("batch", 1, 4, 16))
