"""Plans of small models of the attention family: built, proven by their receipt, run at another batch size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Session, build
from planmill.kernels.attention import (
    GatedLargeKernel,
    GatedLinearAttention,
    GroupedPowerMean,
    HaloAttention,
    LinearAttention,
    LinearRecurrence,
    MambaMixer,
    SubspaceAttention,
    ViGAttention,
)


class Residual(nn.Module):
    """x + block(x)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


def state_space() -> tuple[nn.Module, torch.Tensor, set[str]]:
    blocks = [Residual(MambaMixer(8, 3)), Residual(MambaMixer(8, 3, bidirectional=True)), LinearRecurrence(8, 5)]
    return nn.Sequential(*blocks), torch.randn(2, 9, 8), {"planmill::selective_scan"}


def gated_linear_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    blocks = [Residual(GatedLinearAttention(8, 2)), Residual(ViGAttention(8, 2))]
    return nn.Sequential(*blocks), torch.randn(2, 9, 8), {"planmill::gated_linear_attention"}


def halo_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    blocks = [Residual(HaloAttention(8, num_heads=2, block_size=4, halo_size=1)) for _ in range(2)]
    return nn.Sequential(*blocks), torch.randn(2, 8, 8, 4), {"planmill::halo_attention"}


def linear_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    blocks = [Residual(LinearAttention(8, 2, causal=causal)) for causal in (False, True)]
    return nn.Sequential(*blocks), torch.randn(2, 5, 8), {"planmill::linear_attention"}


def large_kernel_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    blocks = [Residual(GatedLargeKernel(4)) for _ in range(2)]
    return nn.Sequential(*blocks), torch.randn(2, 4, 5, 6), {"planmill::large_kernel_attention"}


def pooling() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return nn.Sequential(Residual(SubspaceAttention(4, 2)), GroupedPowerMean(4, 2)), torch.randn(2, 4, 5, 6), set()


MODELS: list[Callable[[], tuple[nn.Module, torch.Tensor, set[str]]]] = [
    state_space,
    gated_linear_attention,
    halo_attention,
    linear_attention,
    large_kernel_attention,
    pooling,
]


@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_plan(make: Callable[[], tuple[nn.Module, torch.Tensor, set[str]]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, ops = make()
    plan = build(model.eval(), x, tmp_path / "a.plan", dynamic=DynamicDim("batch", 1, 2, 4))
    assert ops <= set(plan.manifest.ops)
    assert plan.manifest.receipt.outputs[0].cosine > 0.999999
    more = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "a.plan")(more), model(more), atol=1e-4, rtol=1e-4)
