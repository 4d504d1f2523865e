"""Plans of small models of the moments family: built, proven by their receipt, run at another batch size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Session, build
from planmill.kernels.moments import (
    CovariancePooling,
    GaussianDetector,
    GaussianHead,
    InstanceWhitening,
    MomentProbingHead,
    PositionGaussians,
    RecalibrationAdapter,
    covariance_moments,
)


class Adapted(nn.Module):
    """Two blocks, each an adapted linear branch with a residual, and a moment probing head; float32 [B, 1 + T, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.adapters = nn.ModuleList([RecalibrationAdapter(8, rank=2) for _ in range(2)])
        self.head = MomentProbingHead(8, 5, hidden=28)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for branch, adapter in zip(self.branches, self.adapters, strict=True):
            x = x + adapter(x, branch(x))
        return self.head(x[:, 0], x)


class Detector(nn.Module):
    """Two convolutions, then all that is fitted to their features; float32 [B, 1, 12, 12] -> four tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 8, 3, 3), nn.GELU(), nn.Conv2d(8, 8, 1))
        with torch.no_grad():
            good = self.features(torch.randn(40, 1, 12, 12))
        self.whole = GaussianDetector.fit(good.mean(1), keep="pca")
        self.places = PositionGaussians.fit(good)
        self.head = GaussianHead.fit(good.mean(1), torch.arange(40) % 3).fold()

    def features(self, x: torch.Tensor) -> torch.Tensor:
        return self.body(x).flatten(2).transpose(1, 2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tokens = self.features(x)
        pooled = tokens.mean(1)
        covariance = covariance_moments(tokens).covariance
        return self.whole(pooled), self.places(tokens), self.head(pooled), covariance


def gaussians() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return Detector(), torch.randn(2, 1, 12, 12), {"planmill::mahalanobis", "planmill::covariance"}


def moment_probing() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return Adapted(), torch.randn(2, 10, 8), {"planmill::head_covariance"}


def matrix_root() -> tuple[nn.Module, torch.Tensor, set[str]]:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), InstanceWhitening(8, groups=2, affine=True), nn.Conv2d(8, 8, 3), InstanceWhitening(8),
        CovariancePooling(8, 6),
    )  # fmt: skip
    return model, torch.randn(2, 3, 10, 9), {"planmill::covariance", "planmill::matrix_root"}


SLOW = [pytest.param(make, marks=pytest.mark.slow) for make in (moment_probing, matrix_root)]


@pytest.mark.parametrize("make", [gaussians, *SLOW], ids=lambda make: make.__name__)
def test_plan(make: Callable[[], tuple[nn.Module, torch.Tensor, set[str]]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, ops = make()
    plan = build(model.eval(), x, tmp_path / "a.plan", dynamic=DynamicDim("batch", 1, 2, 4))
    assert ops <= set(plan.manifest.ops)
    assert min(output.cosine for output in plan.manifest.receipt.outputs) > 0.999999
    more = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "a.plan")(more), model(more), atol=1e-4, rtol=1e-4)
