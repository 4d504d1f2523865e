"""Plans of small models of the attention family: built, proven by their receipt, run at another batch size."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Session, build
from planmill.kernels.attention import (
    ClusterSelfAttention,
    ConvolutionalFeedForward,
    CorrelationAttention,
    CorrelationBlock,
    GatedLargeKernel,
    GatedLinearAttention,
    GlobalHyperKernel,
    GlobalLocalAttention,
    GroupedPowerMean,
    HaloAttention,
    HeadTokenAttention,
    LinearAttention,
    LinearRecurrence,
    MambaMixer,
    PrototypeBlock,
    PrototypeExtractor,
    SoftmaxFreeAttention,
    Streams,
    SubspaceAttention,
    ViGAttention,
    roll_out_row,
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
    blocks = Residual(SubspaceAttention(4, 2)), GlobalHyperKernel(4, 5, hidden=4), GroupedPowerMean(4, 2)
    return nn.Sequential(*blocks), torch.randn(2, 4, 5, 5), set()


def cluster_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    layers = [ClusterSelfAttention(8, 2, 4, 8, causal=True, shared_qk=shared) for shared in (False, True)]
    for layer in layers:
        layer.global_attn.set_centroids(torch.randn(2, 2, 4))
    return (
        nn.Sequential(*map(Residual, layers)),
        torch.randn(2, 9, 8),
        {"planmill::cluster_attention", "planmill::cluster_members"},
    )


class Branches(nn.Module):
    """Two blocks with head tokens, then the patches that their class token came to see."""

    def __init__(self) -> None:
        super().__init__()
        self.attentions = nn.ModuleList(HeadTokenAttention(8, 2) for _ in range(2))
        self.feed_forwards = nn.ModuleList(ConvolutionalFeedForward(8) for _ in range(2))
        self.local = GlobalLocalAttention(8, 2, 0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        seen = []
        for attention, feed_forward in zip(self.attentions, self.feed_forwards, strict=True):
            assert isinstance(attention, HeadTokenAttention)
            seen.append(attention.qkv(x).unflatten(2, (3, 2, 4)).permute(2, 0, 3, 1, 4))
            x = x + attention(x)
            x = x + feed_forward(x)
        scores = roll_out_row([qkv[0] for qkv in seen], [qkv[1] for qkv in seen], chunk=8)
        return self.local(x, scores[:, 1:])[0]


def head_tokens_and_global_local() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return Branches(), torch.randn(2, 10, 8), set()


def softmax_free_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    blocks = [Residual(SoftmaxFreeAttention(8, 2, 2)), Residual(SoftmaxFreeAttention(8, 2, 2, mode="solve"))]
    return nn.Sequential(*blocks), torch.randn(2, 16, 8), {"planmill::softmax_free_attention"}


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


def correlation_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return TwoStreams(), torch.randn(2, 9, 8), {"planmill::correlation_attention"}


def prototype_attention() -> tuple[nn.Module, torch.Tensor, set[str]]:
    return Prototypes(), torch.randn(2, 9, 8), {"planmill::prototype_attention"}


MODELS: list[Callable[[], tuple[nn.Module, torch.Tensor, set[str]]]] = [
    state_space,
    correlation_attention,
    prototype_attention,
    gated_linear_attention,
    halo_attention,
    linear_attention,
    large_kernel_attention,
    pooling,
    cluster_attention,
    head_tokens_and_global_local,
    softmax_free_attention,
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
