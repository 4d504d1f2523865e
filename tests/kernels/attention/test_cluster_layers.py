"""ClusterAttention and ClusterSelfAttention against the package, against the paper's formula, compiled and exported."""

import importlib
from typing import TypeVar

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.attention import ClusterAttention, ClusterSelfAttention

Layer = TypeVar("Layer", ClusterAttention, ClusterSelfAttention)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trained(layer: Layer, seed: int = 7) -> Layer:
    """Random weights and unit centroids."""
    for index, parameter in enumerate(layer.parameters()):
        parameter.data = normal(*parameter.shape, seed=seed + index) * (0.3 if parameter.dim() == 2 else 1.0)
    attention: ClusterAttention = getattr(layer, "global_attn", layer)
    attention.set_centroids(F.normalize(normal(*attention.kmeans.means.shape, seed=seed), dim=-1))
    return layer.eval()


def published(layer: ClusterSelfAttention, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The formulas in float64, one sample, head, cluster and token at a time."""
    attention, width = layer.global_attn, layer.width
    weights = {name: value.double() for name, value in layer.state_dict().items()}
    x = x.double()
    q, v = x @ weights["to_q.weight"].T, x @ weights["to_v.weight"].T
    k = q if attention.shared_qk else x @ weights["to_k.weight"].T
    means, tokens = weights["global_attn.kmeans.means"], x.shape[1]
    out = torch.zeros_like(q)
    for b in range(len(x)):
        for h in range(means.shape[0]):
            part = slice(h * width, (h + 1) * width)
            Q, K, V = (t[b, :, part] for t in (q, k, v))
            if attention.shared_qk:
                K = F.normalize(K, dim=-1)
            total, count = torch.zeros_like(Q), torch.zeros(tokens, dtype=torch.float64)
            for c in range(means.shape[1]):
                i, j = (
                    (F.normalize(t, dim=-1) @ means[h, c]).topk(min(attention.window, tokens)).indices.tolist()
                    for t in (Q, q[b, :, part] if attention.shared_qk else K)
                )
                for n in i:
                    logits = [Q[n] @ m * width**-0.5 for m in weights["global_attn.mem_key"][h, c]]
                    for m in j:
                        hidden = (attention.causal and m > n) or (mask is not None and not (mask[b, n] and mask[b, m]))
                        logit = torch.tensor(-3.4e38, dtype=torch.float64) if hidden else Q[n] @ K[m] * width**-0.5
                        logits.append(torch.tensor(-5e4).double() if attention.shared_qk and n == m else logit)
                    values = torch.cat([weights["global_attn.mem_value"][h, c], V[j]])
                    total[n] += torch.stack(logits).softmax(0) @ values
                    count[n] += 1
            out[b, :, part] = total / (count[:, None] + 1e-5)
    return out @ weights["to_out.weight"].T


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "shared"])
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_equals_the_formula(shared: bool, causal: bool) -> None:
    layer = trained(ClusterSelfAttention(12, 2, 6, 18, shared_qk=shared, causal=causal, memory=2 if shared else 0))
    x = normal(2, 15, 12, seed=1)
    mask = torch.arange(15) < torch.tensor([[15], [9]])
    with torch.no_grad():
        torch.testing.assert_close(layer(x).double(), published(layer, x, None), atol=1e-5, rtol=1e-5)
        got = layer(x.transpose(0, 1).contiguous().transpose(0, 1), mask=mask)
        torch.testing.assert_close(got.double(), published(layer, x, mask), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["separate", "shared", "causal", "shared_causal", "context"])
def test_equals_the_package(kind: str) -> None:
    """Oracle: routing-transformer 1.6.1 (MIT), its SelfAttention and KmeansAttention, rotary embedding included."""
    package = importlib.import_module("routing_transformer.routing_transformer")
    options = {"shared_qk": "shared" in kind, "causal": "causal" in kind, "receives_context": kind == "context"}
    theirs = package.SelfAttention(32, 1, 64, 4, 0, 16, num_mem_kv=0 if kind == "separate" else 2, **options).eval()
    for index, parameter in enumerate(theirs.parameters()):
        parameter.data = normal(*parameter.shape, seed=index) * 0.3
    theirs.global_attn.kmeans.means.copy_(F.normalize(normal(4, 4, 8, seed=20), dim=-1))
    theirs.global_attn.kmeans.initted.fill_(True)
    mine = ClusterSelfAttention.from_routing_transformer(theirs)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    x, mask = normal(2, 50, 32, seed=30), torch.arange(50) < torch.tensor([[50], [31]])
    positions = package.FixedPositionalEmbedding(8, 64)(x)
    with torch.no_grad():
        if kind == "context":
            other, other_mask = normal(2, 40, 32, seed=31), torch.arange(40) < torch.tensor([[22], [40]])
            got = mine(x, other, mask=mask, context_mask=other_mask)
            want, _ = theirs(x, context=other, input_mask=mask, context_mask=other_mask)
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
            return
        torch.testing.assert_close(mine(x), theirs(x)[0], atol=1e-5, rtol=1e-5)
        want, _ = theirs(x, input_mask=mask, pos_emb=positions)
        torch.testing.assert_close(mine(x, mask=mask, positions=positions), want, atol=1e-5, rtol=1e-5)
        q, k, v = (normal(2, 4, 50, 8, seed=seed) for seed in (40, 41, 42))
        k = q if options["shared_qk"] else k
        inner = ClusterAttention.from_routing_transformer(theirs.global_attn)
        torch.testing.assert_close(inner(q, k, v), theirs.global_attn(q, k, v)[0], atol=1e-5, rtol=1e-5)


def test_rotation_is_a_complex_product() -> None:
    layer = trained(ClusterSelfAttention(8, 2, 4, 4, shared_qk=True))
    x, angles = normal(1, 4, 8, seed=1), normal(4, 2, seed=2)
    turns = torch.polar(torch.ones(4, 2), angles)
    got = layer(x, positions=torch.cat([angles.sin(), angles.cos()], -1))
    q, v = (
        torch.view_as_real(torch.view_as_complex(F.linear(x, w).view(1, 4, 2, 2, 2)) * turns[:, None]).view(1, 4, 2, 4)
        for w in (layer.to_q.weight, layer.to_v.weight)
    )
    q, v = (t.transpose(1, 2).contiguous() for t in (q, v))
    want = layer.to_out(layer.global_attn(q, q, v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_gradient_graph_and_export() -> None:
    """Gradients of all parameters, torch.compile(fullgraph=True), torch.export with dynamic batch and sequence."""
    layer = trained(ClusterSelfAttention(12, 2, 6, 18, causal=True))
    x = normal(2, 15, 12, seed=1).requires_grad_()
    layer(x).square().sum().backward()
    twin = trained(ClusterSelfAttention(12, 2, 6, 18, causal=True))
    z = x.detach().clone().requires_grad_()
    for parameter in twin.parameters():
        parameter.requires_grad_()
    step = 1e-2
    direction = {name: normal(*p.shape, seed=index) for index, (name, p) in enumerate(twin.named_parameters())}
    values = []
    for sign in (1, -1):
        moved = trained(ClusterSelfAttention(12, 2, 6, 18, causal=True))
        for name, parameter in moved.named_parameters():
            if "to_q" not in name and "to_k" not in name:  # a step there may move a token to another cluster
                parameter.data += sign * step * direction[name]
        values.append(float(published(moved, z.detach(), None).square().sum()))
    slope = sum(
        float((p.grad * direction[n]).sum())
        for n, p in layer.named_parameters()
        if p.grad is not None and "to_q" not in n and "to_k" not in n
    )
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-2)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        dims = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("tokens", min=6, max=1024)}
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=(dims,))
        more = normal(3, 29, 12, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = trained(ClusterAttention(2, 3, 16, 16, causal=True)).to(dtype)
    exact = ClusterAttention(2, 3, 16, 16, causal=True)
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    q, k, v = (normal(2, 2, 41, 16, seed=seed).to(dtype) for seed in range(3))
    got, want = layer(q, k, v), exact(q.float(), k.float(), v.float())
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), want, atol=0.01, rtol=0.01)


def test_centroids_must_be_those_of_a_model() -> None:
    layer = ClusterAttention(2, 3, 4, 8)
    q = normal(1, 2, 9, 8)
    message = "ClusterAttention: kmeans.initted must be true, got false: the centroids are random numbers"
    with pytest.raises(ValueError, match=message):
        layer(q, q, q)
    trained(layer)(q, q, q)
    fresh = ClusterAttention(2, 3, 4, 8)
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(q, q, q), layer(q, q, q))
    fresh.load_state_dict({**layer.state_dict(), "kmeans.initted": torch.tensor(False)})
    with pytest.raises(ValueError, match=message):
        fresh(q, q, q)
    with pytest.raises(ValueError, match=r"means must be \[2, 3, 8\], got \[2, 8\]"):
        layer.set_centroids(torch.zeros(2, 8))


def test_messages() -> None:
    with pytest.raises(ValueError, match="max_tokens must be a multiple of 6, got 20"):
        ClusterSelfAttention(12, 2, 6, 20)
    with pytest.raises(ValueError, match="max_tokens must be a multiple of 0, got 20"):
        ClusterSelfAttention(12, 2, 0, 20)
    with pytest.raises(ValueError, match="heads must divide dim, 12, got 5"):
        ClusterSelfAttention(12, 5, 6, 18)
    plain = trained(ClusterSelfAttention(12, 2, 6, 18))
    with pytest.raises(ValueError, match=r"x must be \[B, N, 12\], got \[1, 9, 11\]"):
        plain(normal(1, 9, 11))
    with pytest.raises(ValueError, match=r"positions must be \[.., 9, 6\], got \[8, 6\]"):
        plain(normal(1, 9, 12), positions=normal(8, 6))
    with pytest.raises(ValueError, match="context must come without causal and shared_qk"):
        ClusterAttention(2, 3, 4, 8, context=True, causal=True)
    layer = trained(ClusterSelfAttention(12, 2, 6, 18, context=True))
    with pytest.raises(ValueError, match="context must be given where context=True only, got none"):
        layer(normal(1, 9, 12))
