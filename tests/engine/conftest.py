"""Small models and the plans built from them, once per test run."""

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Plan, build
from planmill.engine.plan import write_plan


class Perceptron(nn.Module):
    """float32 [B, 6] -> float32 [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


class Several(nn.Module):
    """int64 tokens [B, 5], float32 weight [B], bool keep [B, 5] -> a dictionary of float32, int64 and bool outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)

    def forward(self, tokens: torch.Tensor, weight: torch.Tensor, keep: torch.Tensor) -> dict[str, Any]:
        mean = (self.table(tokens) * keep[..., None]).mean(1) * weight[:, None]
        return {"mean": mean, "count": keep.sum(1), "any": keep.any(1), "nothing": None}


class Convolutional(nn.Module):
    """float32 [B, 3, H, W] -> float32 [B, 5]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.body(x).mean((2, 3)))


@pytest.fixture(scope="session")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the plans that tests share; read only."""
    return tmp_path_factory.mktemp("plans")


@pytest.fixture(scope="session")
def perceptron() -> nn.Module:
    torch.manual_seed(0)
    return Perceptron().eval()


@pytest.fixture(scope="session")
def perceptron_plan(plans: Path, perceptron: nn.Module) -> Plan:
    return build(
        perceptron,
        torch.randn(1, 6),
        plans / "perceptron.plan",
        dynamic=DynamicDim("batch", 1, 4, 9),
        metadata={"classes": ["a", "b", "c"], "scale": 0.5},
    )


@pytest.fixture(scope="session")
def bf16_plan(plans: Path, perceptron: nn.Module) -> Plan:
    return build(perceptron, torch.randn(2, 6), plans / "bf16.plan", precision="bf16")


@pytest.fixture(scope="session")
def several() -> nn.Module:
    torch.manual_seed(0)
    return Several().eval()


@pytest.fixture(scope="session")
def several_plan(plans: Path, several: nn.Module) -> Plan:
    examples = {
        "tokens": torch.tensor([[0, 10, 3, 4, 5], [1, 2, 3, 4, 5]]),
        "weight": torch.tensor([0.5, 2.0]),
        "keep": torch.ones(2, 5, dtype=torch.bool),
    }
    return build(several, examples, plans / "several.plan")


@pytest.fixture(scope="session")
def convolutional() -> nn.Module:
    torch.manual_seed(0)
    model = Convolutional()
    model.train()
    model(torch.randn(16, 3, 8, 8) * 2 + 1)  # running statistics that folding must respect
    return model.eval()


@pytest.fixture(scope="session")
def convolutional_plan(plans: Path, convolutional: nn.Module) -> Plan:
    sides = {0: DynamicDim("batch", 1, 2, 5), 2: DynamicDim("height", 4, 8, 13), 3: DynamicDim("width", 4, 9, 13)}
    return build(convolutional, torch.randn(2, 3, 8, 8), plans / "convolutional.plan", dynamic={"x": sides})


@pytest.fixture
def forge(perceptron_plan: Plan, tmp_path: Path) -> Callable[..., Path]:
    """Write a sealed plan whose manifest has some fields replaced, whatever they say."""

    def write(**changes: Any) -> Path:
        with zipfile.ZipFile(perceptron_plan.path) as archive:
            payload = Path(archive.extract("aoti.pt2", tmp_path))
        manifest = perceptron_plan.manifest.model_copy(update=changes)
        path = tmp_path / "forged.plan"
        write_plan(path, manifest, {p.name: payload for p in manifest.payloads})
        return path

    return write
