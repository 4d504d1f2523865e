"""Plans of small models of the attention family: built, proven by their receipt, run at another batch size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Session, build
from planmill.kernels.attention import (
    ClusterSelfAttention,
    CorrelationAttention,
    CorrelationBlock,
    GatedLargeKernel,
    HaloAttention,
    LinearAttention,
    MambaMixer,
    PrototypeBlock,
    PrototypeExtractor,
    SoftmaxFreeAttention,
    Streams,
    ViGAttention,
)


class Residual(nn.Module):
    """x + block(x)."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.block(x)


Model = tuple[nn.Module, torch.Tensor, set[str]]


def recurrences() -> Model:
    """Layers that walk along the sequence; float32 [B, 9, 8]."""
    blocks = [
        Residual(MambaMixer(8, 3, bidirectional=True)),
        Residual(ViGAttention(8, 2)),
        *(Residual(LinearAttention(8, 2, causal=causal)) for causal in (False, True)),
    ]
    ops = {"planmill::selective_scan", "planmill::gated_linear_attention", "planmill::linear_attention"}
    return nn.Sequential(*blocks), torch.randn(2, 9, 8), ops


def images() -> Model:
    """Layers of feature maps; float32 [B, 8, 8, 8]."""
    blocks = [
        Residual(HaloAttention(8, num_heads=2, block_size=4, halo_size=1)),
        Residual(GatedLargeKernel(8)),
    ]
    ops = {"planmill::halo_attention", "planmill::large_kernel_attention"}
    return nn.Sequential(*blocks), torch.randn(2, 8, 8, 8), ops


def selections() -> Model:
    """Layers that attend to some tokens: clusters, landmarks; float32 [B, 16, 8]."""
    clusters = [ClusterSelfAttention(8, 2, 4, 16, causal=True, shared_qk=shared) for shared in (False, True)]
    for layer in clusters:
        layer.global_attn.set_centroids(torch.randn(2, 4, 4))
    landmarks = [SoftmaxFreeAttention(8, 2, 2), SoftmaxFreeAttention(8, 2, 2, mode="solve")]
    ops = {"planmill::cluster_attention", "planmill::cluster_members", "planmill::softmax_free_attention"}
    return nn.Sequential(*map(Residual, [*clusters, *landmarks])), torch.randn(2, 16, 8), ops


class TwoStreams(nn.Module):
    """Two blocks of two streams; the new stream, the class token from the original one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            CorrelationBlock(CorrelationAttention(8, 2), nn.LayerNorm(8), nn.LayerNorm(8), nn.Linear(8, 8))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        streams = Streams(x, x)
        for block in self.blocks:
            streams = block(streams)
        return torch.cat([streams.original[:, :1], streams.new[:, 1:]], 1)


class Prototypes(nn.Module):
    """INP-Former's extractor and two blocks of its decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(3, 8))
        self.extractor = PrototypeExtractor(8, 2)
        self.blocks = nn.ModuleList(PrototypeBlock(8, 2) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        prototypes = self.extractor(self.tokens, x)
        for block in self.blocks:
            x = block(x, prototypes)
        return x


def streams_and_prototypes() -> Model:
    """Two streams, prototypes; float32 [B, 10, 8]."""
    ops = {f"planmill::{name}_attention" for name in ("correlation", "prototype", "softmax")}
    return nn.Sequential(TwoStreams(), Prototypes()), torch.randn(2, 10, 8), ops


MODELS = (recurrences, images, selections, streams_and_prototypes)


@pytest.mark.slow
@pytest.mark.parametrize("make", MODELS, ids=lambda make: make.__name__)
def test_plan(make: Callable[[], Model], tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, ops = make()
    plan = build(model.eval(), x, tmp_path / "a.plan", dynamic=DynamicDim("batch", 1, 2, 4))
    assert ops <= set(plan.manifest.ops)
    assert plan.manifest.receipt.outputs[0].cosine > 0.999999
    more = torch.randn(3, *x.shape[1:])
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "a.plan")(more), model(more), atol=1e-4, rtol=1e-4)
