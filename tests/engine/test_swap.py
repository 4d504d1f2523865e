"""accelerate, and plans of the models that it makes: blocks of transformers and timm replaced by ours."""

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, PlanError, Session, accelerate, build
from planmill.kernels.attention import HaloAttention
from planmill.kernels.routing import SparseMoE


def mixtral_module() -> Any:
    """transformers' Mixtral (Apache-2.0), imported with the checkout off the path: its `kernels` is another package."""
    root = str(Path(__file__).parents[2])
    with mock.patch.object(sys, "path", [entry for entry in sys.path if entry not in ("", root)]):
        return importlib.import_module("transformers.models.mixtral.modeling_mixtral")


class Encoder(nn.Module):
    """float32 [B, 9, 6] -> logits [B, 3]: tokens through one residual block of experts."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.embed = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.block = block
        self.head = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(x)
        return self.head((tokens + self.block(self.norm(tokens))).mean(1))


@pytest.fixture
def published() -> Encoder:
    """With a Mixtral block of four experts, random weights."""
    torch.manual_seed(0)
    module = mixtral_module()
    config = module.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.0
    )
    model = Encoder(module.MixtralSparseMoeBlock(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_a_twin_with_the_same_weights(published: Encoder) -> None:
    twin, replaced = accelerate(published)
    assert replaced == ["block"]
    assert isinstance(twin.get_submodule("block"), SparseMoE)
    assert not isinstance(published.block, SparseMoE)
    for name in ("embed.weight", "block.experts.down_proj"):
        assert twin.get_parameter(name) is published.get_parameter(name)
    assert not twin.training
    x = torch.randn(5, 9, 6)
    torch.testing.assert_close(twin(x), published(x), atol=1e-5, rtol=1e-5)
    layer, names = accelerate(published.block)
    assert names == [""]
    assert isinstance(layer, SparseMoE)


def test_a_whole_model_of_transformers() -> None:
    module = mixtral_module()
    config = module.MixtralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = module.MixtralModel(config).eval()
    twin, replaced = accelerate(model)
    assert replaced == ["layers.0.mlp", "layers.1.mlp"]
    tokens = torch.randint(0, 50, (2, 7))
    with torch.no_grad():
        want, got = model(tokens, use_cache=False), twin(tokens, use_cache=False)
    torch.testing.assert_close(got.last_hidden_state, want.last_hidden_state, atol=1e-5, rtol=1e-5)


def test_a_whole_model_of_timm() -> None:
    """timm's halonet26t (Apache-2.0): three of its blocks attend to a halo, one of them with stride 2."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("halonet26t", num_classes=7).eval()
    twin, replaced = accelerate(model)
    assert replaced == ["stages.2.1.self_attn", "stages.3.0.self_attn", "stages.3.1.self_attn"]
    assert all(isinstance(twin.get_submodule(name), HaloAttention) for name in replaced)
    assert {id(p) for p in twin.parameters()} == {id(p) for p in model.parameters()}
    x = torch.randn(1, 3, 256, 256)
    with torch.no_grad():
        want, got = model(x), twin(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_nothing_to_replace(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    assert accelerate(model).replaced == []
    with pytest.raises(PlanError, match="no block of the model is known"):
        build(model, torch.randn(2, 4), tmp_path / "a.plan", accelerate=True)


def test_hooks_are_not_dropped_silently(published: Encoder) -> None:
    published.block.register_forward_hook(lambda *_: None)
    with pytest.raises(PlanError, match="block: has hooks"):
        accelerate(published)


def test_plan_of_an_accelerated_model(published: Encoder, tmp_path: Path) -> None:
    """The program holds our ops; the receipt compares it with the model as it was given."""
    x = torch.randn(2, 9, 6)
    plan = build(published, x, tmp_path / "a.plan", dynamic=DynamicDim("batch", 1, 2, 8), accelerate=True)
    assert {"planmill::expert_mixture", "planmill::token_routing"} <= set(plan.manifest.ops)
    assert plan.manifest.receipt.outputs[0].cosine > 0.99999
    session = Session(tmp_path / "a.plan")
    for batch in (1, 5):
        x = torch.randn(batch, 9, 6)
        (logits,) = session.run(x).values()
        torch.testing.assert_close(logits, published(x), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_plan_of_an_accelerated_model_of_timm(tmp_path: Path) -> None:
    from timm.layers.halo_attn import HaloAttn

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 4, 4), HaloAttn(16, num_heads=2, block_size=4, halo_size=1), nn.ReLU(),
        HaloAttn(16, 8, stride=2, num_heads=2, block_size=4, halo_size=1),
    ).eval()  # fmt: skip
    batch = DynamicDim("batch", 1, 2, 4)
    plan = build(model, torch.randn(2, 3, 32, 16), tmp_path / "a.plan", dynamic=batch, accelerate=True)
    assert plan.manifest.ops == ["planmill::halo_attention", "planmill::packed_linear"]  # the convolution cuts patches
    x = torch.randn(3, 3, 32, 16)
    with torch.no_grad():
        torch.testing.assert_close(Session(tmp_path / "a.plan")(x), model(x), atol=1e-5, rtol=1e-5)


def test_plan_in_bf16_of_a_model_with_sparse_moe(tmp_path: Path) -> None:
    torch.manual_seed(1)
    block = SparseMoE(16, 32, 4, 4, renormalize=True, shared_hidden=24)  # all experts: no choice for rounding to flip
    model = Encoder(block).eval()
    plan = build(model, torch.randn(2, 9, 6), tmp_path / "b.plan", dynamic=None, precision="bf16")
    assert plan.manifest.receipt.outputs[0].cosine > 0.999
