"""SparseMoE against the blocks of transformers 5 (Apache-2.0), built in float64 as oracles, and V-MoE's capacity rule.

The oracles' own state dicts, older layouts of the same weights, gradients, export and compile are compared too.
"""

import importlib
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels import find_conversion
from planmill.kernels.routing import SparseMoE, expert_capacity

D, E = 24, 8


def published(family: str) -> Any:
    """The module of a family in transformers.

    `python -m pytest` puts the checkout on the path, where transformers takes kernels/ for a package of its own.
    """
    root = str(Path(__file__).resolve().parents[3])
    with mock.patch.object(sys, "path", [entry for entry in sys.path if entry not in ("", root)]):
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def mixtral() -> Any:
    family = published("mixtral")
    config = family.MixtralConfig(hidden_size=D, intermediate_size=20, num_local_experts=E, num_experts_per_tok=2)
    return family.MixtralSparseMoeBlock(config)


def qwen2() -> Any:
    family = published("qwen2_moe")
    config = family.Qwen2MoeConfig(
        hidden_size=D, moe_intermediate_size=12, shared_expert_intermediate_size=28, num_experts=E,
        num_experts_per_tok=3, norm_topk_prob=False,
    )  # fmt: skip
    return family.Qwen2MoeSparseMoeBlock(config)


def qwen3() -> Any:
    family = published("qwen3_moe")
    config = family.Qwen3MoeConfig(
        hidden_size=D, moe_intermediate_size=12, num_experts=E, num_experts_per_tok=3, norm_topk_prob=True
    )
    return family.Qwen3MoeSparseMoeBlock(config)


def deepseek() -> Any:
    family = published("deepseek_v3")
    config = family.DeepseekV3Config(
        hidden_size=D, moe_intermediate_size=12, n_routed_experts=E, num_experts_per_tok=3, n_group=4, topk_group=2,
        n_shared_experts=2, routed_scaling_factor=2.5, norm_topk_prob=True,
    )  # fmt: skip
    return family.DeepseekV3MoE(config)


BUILDERS = [mixtral, qwen2, qwen3, deepseek]


def block(build: Any, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A published block with random weights of the order that keeps its result at one."""
    generator = torch.Generator().manual_seed(seed)
    made = build()
    made.experts.config._experts_implementation = "eager"
    for name, tensor in [*made.named_parameters(), *made.named_buffers()]:
        scale = 0.1 if name.endswith("bias") else 3 * tensor.shape[-1] ** -0.5
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    made.eval()
    correction = getattr(made.gate, "e_score_correction_bias", None)
    made.to(dtype)
    if correction is not None:  # published as float32 in checkpoints of any dtype
        made.gate.e_score_correction_bias = correction.float()
    return made


def tokens(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def oracle(build: Any, made: Any, x: torch.Tensor) -> torch.Tensor:
    """The published block with the same (perhaps rounded) weights and tokens in float64; its softmax is float32."""
    exact = build().double().eval()
    exact.experts.config._experts_implementation = "eager"
    exact.load_state_dict({name: tensor.double() for name, tensor in made.state_dict().items()})
    with torch.no_grad():
        return exact(x.double())


@pytest.mark.parametrize("count", [1, 7, 45])
@pytest.mark.parametrize("build", BUILDERS)
def test_float32_is_the_published_block(build: Any, count: int) -> None:
    made, x = block(build), tokens(1, count, D)
    layer = SparseMoE.from_module(made)
    y = layer(x)
    assert y.shape == x.shape
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), oracle(build, made, x), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", BUILDERS)
def test_half_precision_given_the_same_choice(build: Any, dtype: torch.dtype) -> None:
    """Rounded logits may flip near ties, here as there: tokens whose experts are those of float64 are compared."""
    made, x = block(build, dtype), tokens(1, 45, D).to(dtype)
    y, logits, indices, _ = SparseMoE.from_module(made)(x, return_routing=True)
    assert y.dtype == dtype
    exact = SparseMoE.from_module(block(build).float())
    exact.load_state_dict({name: tensor.float() for name, tensor in SparseMoE.from_module(made).state_dict().items()})
    same = (indices == exact(x.float(), return_routing=True)[2]).all(1)
    assert int(same.sum()) > 30
    want = oracle(build, made, x)[0][same]
    error = (y.detach()[0][same].double() - want).abs().amax() / want.abs().amax()
    assert float(error) < (2e-2 if dtype == torch.bfloat16 else 3e-3)
    assert logits.dtype == (torch.float32 if build is deepseek else dtype)


@pytest.mark.parametrize("build", BUILDERS)
def test_gradients_are_those_of_the_published_block(build: Any) -> None:
    made, x = block(build), tokens(1, 19, D)
    layer = SparseMoE.from_module(made)
    pull = tokens(1, 19, D, seed=2)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    (layer(mine) * pull).sum().backward()
    got = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    made.zero_grad()
    (made(theirs) * pull).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert set(got) == {name for name, _ in layer.named_parameters()}
    for name, parameter in made.named_parameters():
        if name in got:
            torch.testing.assert_close(got[name], parameter.grad, atol=1e-4, rtol=1e-4)
    shared = getattr(made, "shared_expert", getattr(made, "shared_experts", None))
    if shared is not None:
        fused = torch.cat([shared.gate_proj.weight.grad, shared.up_proj.weight.grad])
        torch.testing.assert_close(got["shared_expert.gate_up_proj"][0], fused, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(
            got["shared_expert.down_proj"][0], shared.down_proj.weight.grad, atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("build", BUILDERS)
def test_parameters_are_shared_where_the_layout_is_the_same(build: Any) -> None:
    made = block(build)
    layer = SparseMoE.from_module(made)
    assert layer.experts.gate_up_proj is made.experts.gate_up_proj
    assert layer.experts.down_proj is made.experts.down_proj
    assert layer.gate.weight is made.gate.weight
    names = set(made.state_dict()) & set(layer.state_dict())
    assert {"gate.weight", "experts.gate_up_proj", "experts.down_proj"} <= names
    assert all(parameter.requires_grad for parameter in layer.parameters())
    frozen = SparseMoE.from_module(made.requires_grad_(False))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    constructor, options = STATE_OPTIONS[build]
    loaded = getattr(SparseMoE, constructor)(made.state_dict(), **options)
    assert all(parameter.requires_grad for parameter in loaded.parameters())


STATE_OPTIONS: dict[Any, tuple[str, dict[str, Any]]] = {
    mixtral: ("from_mixtral", {"k": 2}),
    qwen2: ("from_qwen", {"k": 3, "renormalize": False}),
    qwen3: ("from_qwen", {"k": 3, "renormalize": True}),
    deepseek: ("from_deepseek", {"k": 3, "groups": 4, "top_groups": 2, "renormalize": True, "scale": 2.5}),
}


def per_expert(state: dict[str, torch.Tensor], names: tuple[str, str, str]) -> dict[str, torch.Tensor]:
    """The layout of transformers 4: a matrix per expert and part."""
    rest = {n: t for n, t in state.items() if not n.startswith("experts.")}
    for e in range(E):
        gate, up = state["experts.gate_up_proj"][e].chunk(2)
        parts = (gate, up, state["experts.down_proj"][e])
        rest |= {f"experts.{e}.{name}.weight": part for name, part in zip(names, parts, strict=True)}
    return rest


@pytest.mark.parametrize("build", BUILDERS)
@pytest.mark.parametrize("names", [None, ("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj")], ids=str)
def test_state_dicts_of_today_and_before(build: Any, names: Any) -> None:
    made, x = block(build), tokens(5, D)
    state = made.state_dict() if names is None else per_expert(made.state_dict(), names)
    constructor, options = STATE_OPTIONS[build]
    want = SparseMoE.from_module(made)(x)
    assert torch.equal(getattr(SparseMoE, constructor)(state, **options)(x), want)
    loaded = SparseMoE.from_module(block(build, seed=9))
    assert not torch.equal(loaded(x), want)
    holder = nn.ModuleDict({"mlp": loaded})
    holder.load_state_dict({f"mlp.{name}": tensor for name, tensor in state.items()})
    assert torch.equal(loaded(x), want)
    loaded.load_state_dict(loaded.state_dict())
    assert torch.equal(loaded(x), want)


def vmoe_parameters(hidden: int = 20) -> dict[str, Any]:
    """Nested, with the names and axes of Flax: kernels [E, inputs, outputs], router [D, E]."""
    dense = {
        "Dense_0": {"kernel": tokens(E, D, hidden, seed=2) / 5, "bias": tokens(E, hidden, seed=3)},
        "Dense_1": {"kernel": tokens(E, hidden, D, seed=4) / 5, "bias": tokens(E, D, seed=5)},
    }
    return {"Moe": {"Mlp": dense, "Router": {"dense": {"kernel": tokens(D, E, seed=6)}}}}


def vmoe_restated(p: dict[str, Any], x: torch.Tensor, k: int, capacity: int | None, group: int) -> torch.Tensor:
    """V-MoE's rule, token by token: first choices before second ones, a place counts though it overflows."""
    mlp, router = p["Moe"]["Mlp"], p["Moe"]["Router"]["dense"]["kernel"]
    gates = (x @ router).softmax(1)
    top = gates.topk(k)
    y = torch.zeros_like(x)
    for first in range(0, len(x), group):
        used = [0] * E
        for j in range(k):
            for t in range(first, min(first + group, len(x))):
                e = int(top.indices[t, j])
                used[e] += 1
                if capacity is not None and used[e] > capacity:
                    continue
                h = F.gelu(x[t] @ mlp["Dense_0"]["kernel"][e] + mlp["Dense_0"]["bias"][e], approximate="tanh")
                y[t] += top.values[t, j] * (h @ mlp["Dense_1"]["kernel"][e] + mlp["Dense_1"]["bias"][e])
    return y


@pytest.mark.parametrize(("factor", "group"), [(None, None), (1.0, None), (0.5, 24)])
def test_vmoe(factor: float | None, group: int | None) -> None:
    p, x = vmoe_parameters(), tokens(60, D)
    options = {} if factor is None else {"capacity_factor": factor, "capacity_group": group}
    layer = SparseMoE.from_vmoe(p, k=2, **options)
    size = group or len(x)
    capacity = None if factor is None else expert_capacity(size, 2, E, factor)
    y, _, indices, weights = layer(x, return_routing=True)
    torch.testing.assert_close(y, vmoe_restated(p, x, 2, capacity, size), atol=2e-5, rtol=2e-5)
    assert bool((indices < 0).any()) == (factor is not None)
    assert bool((weights.sum(1) < 1).all())
    flat = {
        "Moe/Mlp/Dense_0/kernel": p["Moe"]["Mlp"]["Dense_0"]["kernel"].numpy(),
        "Moe/Mlp/Dense_0/bias": p["Moe"]["Mlp"]["Dense_0"]["bias"].numpy(),
        "Moe/Mlp/Dense_1/kernel": p["Moe"]["Mlp"]["Dense_1"]["kernel"].numpy(),
        "Moe/Mlp/Dense_1/bias": p["Moe"]["Mlp"]["Dense_1"]["bias"].numpy(),
        "Moe/Router/dense/kernel": p["Moe"]["Router"]["dense"]["kernel"].numpy(),
    }
    assert torch.equal(SparseMoE.from_vmoe(flat, k=2, **options)(x), y)


@pytest.mark.parametrize("build", BUILDERS)
def test_a_token_does_not_depend_on_its_batch(build: Any) -> None:
    """Bit for bit: router, experts, shared expert and its gate."""
    layer, x = SparseMoE.from_module(block(build)), tokens(133, D)
    y, logits, _, _ = layer(x, return_routing=True)
    for part in (slice(0, 1), slice(20, 27), slice(60, 132)):
        assert torch.equal(layer.score(x[part]), logits[part])
        assert torch.equal(layer(x[part]), y[part])


def test_tokens_permuted_are_results_permuted() -> None:
    layer, x = SparseMoE.from_module(block(qwen2)), tokens(33, D)
    order = torch.randperm(33, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(layer(x[order]), layer(x)[order], atol=1e-5, rtol=1e-5)


def test_all_experts_renormalized_are_the_dense_mixture() -> None:
    layer, x = SparseMoE(D, 16, 5, 5, renormalize=True), tokens(9, D)
    dense = torch.zeros_like(x)
    shares = F.linear(x, layer.gate.weight).softmax(1)
    for e in range(5):
        gate, up = F.linear(x, layer.experts.gate_up_proj[e]).chunk(2, 1)
        dense += shares[:, e : e + 1] * F.linear(F.silu(gate) * up, layer.experts.down_proj[e])
    torch.testing.assert_close(layer(x), dense, atol=1e-5, rtol=1e-5)


def test_compiles_as_one_graph_and_exports_with_dynamic_tokens() -> None:
    layer = SparseMoE.from_module(block(qwen2))
    layer.requires_grad_(False)
    x, longer = tokens(2, 5, D), tokens(2, 11, D)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    torch.testing.assert_close(compiled(x), layer(x), atol=1e-6, rtol=1e-6)
    program = torch.export.export(layer, (x,), dynamic_shapes=({1: torch.export.Dim("tokens", min=2, max=4096)},))
    torch.testing.assert_close(program.module()(longer), layer(longer), atol=1e-6, rtol=1e-6)


def test_compiled_training_step() -> None:
    layer, x = SparseMoE.from_module(block(deepseek)), tokens(6, D).requires_grad_()
    torch.compiler.reset()
    torch.compile(layer, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    compiled, x.grad = x.grad, None
    layer(x).square().sum().backward()
    torch.testing.assert_close(compiled, x.grad, atol=1e-4, rtol=1e-4)


def test_jitter_is_for_training_only() -> None:
    layer, x = SparseMoE.from_mixtral(block(mixtral), jitter=0.3), tokens(6, D)
    before = x.clone()
    assert torch.equal(layer.eval()(x), layer(x))
    assert not torch.equal(layer.train()(x), layer(x))
    assert torch.equal(x, before)


def test_shapes_dtypes_and_no_tokens() -> None:
    layer = SparseMoE.from_module(block(qwen2))
    for shape in ((0, D), (2, 0, D), (D,), (2, 3, 4, D)):
        x = tokens(*shape)
        assert layer(x).shape == x.shape
    assert layer(tokens(3, 4, D).transpose(0, 1)).shape == (4, 3, D)


def test_find_conversion() -> None:
    build = find_conversion(block(mixtral))
    assert build is not None
    assert isinstance(build(block(mixtral)), SparseMoE)
    assert find_conversion(nn.Linear(2, 2)) is None
    with pytest.raises(ValueError, match="SparseMoE: no conversion of Linear; there are MixtralSparseMoeBlock"):
        SparseMoE.from_module(nn.Linear(2, 2))


def test_messages() -> None:
    state = block(mixtral).state_dict()
    with pytest.raises(ValueError, match="does not hold k: give it as a keyword"):
        SparseMoE.from_mixtral(state)
    with pytest.raises(ValueError, match="does not hold k, groups, top_groups, renormalize, scale"):
        SparseMoE.from_deepseek(state)
    with pytest.raises(ValueError, match=r"experts\.down_proj is missing; there are"):
        SparseMoE.from_mixtral({n: t for n, t in state.items() if "down" not in n}, k=2)
    with pytest.raises(ValueError, match="extra has no place in the layer"):
        SparseMoE.from_mixtral({**state, "extra": torch.zeros(1)}, k=2)
    with pytest.raises(ValueError, match=r"experts.gate_up_proj must be \[8, 40, 24\], got \[8, 39, 24\]"):
        SparseMoE.from_mixtral({**state, "experts.gate_up_proj": torch.zeros(8, 39, 24)}, k=2)
    old = per_expert(state, ("w1", "w3", "w2"))
    with pytest.raises(ValueError, match="up weight of expert 3 is missing"):
        SparseMoE.from_mixtral({n: t for n, t in old.items() if n != "experts.3.w3.weight"}, k=2)
    with pytest.raises(ValueError, match=r"no place for experts\.0\.w9\.weight"):
        SparseMoE.from_mixtral({**old, "experts.0.w9.weight": torch.zeros(1)}, k=2)
    with pytest.raises(ValueError, match="k must be from 1 to E = 4, got 5"):
        SparseMoE(8, 8, 4, 5)
    with pytest.raises(ValueError, match="router_dtype must be 'model' or 'float32', got 'half'"):
        SparseMoE(8, 8, 4, 2, router_dtype="half")
    with pytest.raises(ValueError, match="capacity_group needs a capacity_factor, got None"):
        SparseMoE(8, 8, 4, 2, capacity_group=4)
    odd = block(mixtral)
    odd.experts.config.hidden_act = "tanh"
    with pytest.raises(ValueError, match=r"activation must be one of silu, .*, got 'tanh'"):
        SparseMoE.from_module(odd)
