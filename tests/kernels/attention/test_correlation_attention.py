"""CorrelationAttention, D-Attn and CLIP feature surgery against the published formulas, restated in float64."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels import cpu_capability, ops
from planmill.kernels.attention import (
    CorrelationAttention,
    CorrelationBlock,
    Streams,
    attend_by_correlation,
    attend_by_similarity,
    attend_in_two_streams,
    remove_redundancy,
)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(x: torch.Tensor, weights: dict[str, torch.Tensor], heads: int, kind: str) -> tuple[torch.Tensor, ...]:
    """Crane's SelfCorAttention and CLIP Surgery's Attention from their formulas: (new, original)."""
    x, weights = x.double(), {name: w.double() for name, w in weights.items()}
    batch, tokens, dim = x.shape
    qkv = F.linear(x, weights["qkv.weight"], weights["qkv.bias"]).view(batch, tokens, 3, heads, dim // heads)
    q, k, v = (qkv[:, :, i].transpose(1, 2) for i in range(3))
    c = (dim // heads) ** -0.5
    if kind == "qkv":
        joint = torch.cat([q, k, v], -1)
        maps = ((joint @ joint.mT) * c * 3**-0.5).softmax(-1)
    else:
        of = {"q": q, "k": k, "v": v}
        maps = sum(((of[n[0]] @ of[n[1]].mT) * c).softmax(-1) for n in kind.split("+"))

    def project(p: Any) -> torch.Tensor:
        out = (p @ v).transpose(1, 2).reshape(batch, tokens, dim)
        return F.linear(out, weights["proj.weight"], weights["proj.bias"])

    return project(maps), project(((q @ k.mT) * c).softmax(-1))


@pytest.mark.parametrize("kind", ["vv", "kk", "qq", "qq+kk", "qq+kk+vv", "qkv"])
def test_equals_the_published_layers(kind: str) -> None:
    """Oracles: the formulas of Crane (MIT) and CLIP Surgery (facts only: it has no licence)."""
    layer = CorrelationAttention(24, 3, maps=kind)
    x = normal(2, 37, 24)
    for got, want in zip(layer(x), published(x, layer.state_dict(), 3, kind), strict=True):
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)


def test_two_streams_of_blocks() -> None:
    """Only the original stream has an MLP, and both results come from it."""
    blocks = nn.ModuleList(
        CorrelationBlock(CorrelationAttention(12, 2), nn.LayerNorm(12), nn.LayerNorm(12), nn.Linear(12, 12))
        for _ in range(2)
    )
    x = normal(2, 9, 12)
    new = original = x.double()
    streams: torch.Tensor | Streams = x
    for block in blocks:
        streams = block(streams)
        assert isinstance(block, CorrelationBlock)
        attention = block.attention.state_dict()
        twin = copy.deepcopy(block).double()
        found = published(twin.norm1(original), attention, 2, "qq+kk+vv")
        new, original = new + found[0], original + found[1]
        original = original + twin.mlp(twin.norm2(original))
    assert isinstance(streams, Streams)
    torch.testing.assert_close(streams.new.double(), new, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(streams.original.double(), original, atol=2e-5, rtol=1e-5)


def test_takes_the_weights_of_trained_attentions() -> None:
    """Oracle: torch's own MultiheadAttention; timm's and transformers' layouts by their attributes."""
    torch.manual_seed(0)
    source = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    nn.init.normal_(source.in_proj_bias)
    x = normal(2, 11, 24)
    layer = CorrelationAttention.from_attention(source)
    want = source(x, x, x, need_weights=False)[0]
    torch.testing.assert_close(layer(x).original, want, atol=1e-5, rtol=1e-5)
    assert layer.qkv.weight is source.in_proj_weight

    fused: Any = nn.Module()
    fused.qkv, fused.proj, fused.num_heads, fused.scale = layer.qkv, layer.proj, 3, 8**-0.5
    parts: Any = nn.Module()
    for name, weight, bias in zip("qkv", source.in_proj_weight.chunk(3), source.in_proj_bias.chunk(3), strict=True):
        linear = nn.Linear(24, 24)
        linear.weight.data, linear.bias.data = weight.data, bias.data
        setattr(parts, f"{name}_proj", linear)
    parts.out_proj, parts.num_heads = source.out_proj, 3
    for other in (fused, parts):
        again = CorrelationAttention.from_attention(other, maps="vv")
        assert again.maps == "vv"
        torch.testing.assert_close(again(x).original, want, atol=1e-5, rtol=1e-5)
    fused.scale = 0.1
    assert CorrelationAttention.from_attention(fused).scale == 0.1
    fused.q_norm = nn.LayerNorm(8)
    with pytest.raises(ValueError, match="Module has a q_norm, which this layer does not"):
        CorrelationAttention.from_attention(fused)


def test_d_attn_of_the_layer() -> None:
    """Oracle: Crane's custom_attn (MIT), restated: one map for all heads, values resized to the other model's grid."""
    layer = CorrelationAttention(12, 2)
    x, features = normal(2, 1 + 6, 12), normal(2, 5, 3, 4, seed=1) + 0.3
    rows = F.normalize(features.double().flatten(2), dim=1)
    S = rows.mT @ rows
    S = (S - 1.2 * S.mean()) * 3
    P = S.masked_fill(S < 0, -torch.inf).softmax(-1)
    v = F.linear(x, layer.qkv.weight[24:], layer.qkv.bias[24:])[:, 1:].double()
    v = F.interpolate(v.mT.unflatten(2, (2, 3)), (3, 4), mode="bilinear").flatten(2).mT
    want = F.linear(P @ v, layer.proj.weight.double(), layer.proj.bias.double())
    got = layer.attend_from_features(x, features, grid=(2, 3), batch_coupled=True)
    torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    alone = torch.cat([layer.attend_from_features(x[i : i + 1], features[i : i + 1], grid=(2, 3)) for i in (0, 1)])
    assert torch.equal(layer.attend_from_features(x, features, grid=(2, 3)), alone)
    assert not torch.allclose(got, alone), "the published mean is over the batch"


def test_a_row_without_partners_keeps_its_value() -> None:
    features = torch.ones(1, 5, 3) + 1e-3 * normal(1, 5, 3)  # mean similarity 1: no pair reaches 1.2 of it
    values = normal(1, 5, 4)
    assert torch.equal(attend_by_similarity(features, values), values)


def test_removing_redundancy_is_the_published_formula() -> None:
    """Oracle: CLIP Surgery's feature surgery, restated with its [B, N, T, C] products."""
    image, text = F.normalize(normal(3, 8, 16), dim=2), F.normalize(normal(5, 16, seed=1), dim=1)
    got = remove_redundancy(image, text)
    for b in range(3):
        f, t = image[b].double(), text.double()
        p = (2 * f[:1] @ t.T).softmax(1)
        products = f[:, None] * t[None] * (p / p.mean())[0, :, None]
        want = (products - products.mean(1, keepdim=True)).sum(2)
        torch.testing.assert_close(got[b].double(), want, atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"text must be \[T, 16\] with T at least 1, got \[0, 16\]"):
        remove_redundancy(image, text[:0])


@pytest.mark.usefixtures("two_threads")
def test_a_sample_alone_is_the_sample_in_a_batch() -> None:
    q, k, v = normal(3, 3, 2, 131, 16).unbind(0)
    together = attend_in_two_streams(q, k, v)
    alone = attend_in_two_streams(q[1:2], k[1:2], v[1:2])
    v[0] = q[2] = torch.nan
    beside_nan = attend_in_two_streams(q, k, v)
    for a, b, c in zip(together, alone, beside_nan, strict=True):
        assert torch.equal(a[1:2], b)
        assert torch.equal(a[1], c[1])
    torch.testing.assert_close(attend_by_correlation(q[1:2], k[1:2], v[1:2], maps="qk"), alone.original)


def test_random_shapes() -> None:
    """Random sizes and kinds of data against the definitions, on each instruction set's default."""
    for seed in range(120):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: Any) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        heads = [pick(1, 2), pick(1, 3)]
        tokens, d, dv = (
            pick(1, 2, 23, 24, 25, 63, 64, 65, 129, 200),
            pick(1, 3, 8, 16, 33, 64, 130),
            pick(1, 8, 20, 64, 65),
        )
        maps = pick("qq", "kk", "vv", "qk", "qkv", "qq+kk", "qq+kk+vv", "vv+qk+qkv")
        q, k, v = (torch.randn(*heads, tokens, w, generator=g) * pick(1e-3, 1, 1, 5) for w in (d, d, dv))
        if pick(0, 0, 1):
            pick(q, k)[torch.rand(*heads, tokens, generator=g) < pick(0.02, 0.5)] = torch.nan
        args = (q, k, v, maps, pick(True, False), pick(1.0, d**-0.5, -0.3))
        spec = ops()["correlation_attention"]
        assert spec.compare is not None
        print(f"seed {seed}: {heads} {tokens} {d} {dv} {maps} {args[4:]}")  # shown by pytest where it fails
        spec.compare(args, spec.op(*args), spec.reference(*args), 2e-5, 2e-5)
        features = torch.randn(heads[0], tokens, d, generator=g) + pick(0, 0.3, 1)
        more = (features, v[:, 0], pick(1.2, 0.9), pick(3.0, 50.0), pick(True, False))
        similarity = ops()["similarity_attention"]
        assert similarity.compare is not None
        if features.shape[2] > 1:  # cosines of single numbers are all 1 or -1
            similarity.compare(more, (similarity.op(*more),), (similarity.reference(*more),), 5e-5, 2e-5)


def test_gradient_one_graph_and_export() -> None:
    layer = CorrelationAttention(12, 2)
    x = normal(2, 9, 12)
    z = x.double().requires_grad_()
    y = x.clone().requires_grad_()
    want = published(z, layer.state_dict(), 2, "qq+kk+vv")
    got = layer(y)
    (got.new.square().sum() + got.original.sum()).backward()
    (want[0].square().sum() + want[1].sum()).backward()
    assert y.grad is not None
    torch.testing.assert_close(y.grad.double(), z.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        dims = ({0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("tokens", min=2, max=4096)},)
        program = torch.export.export(layer, (x,), dynamic_shapes=dims)
        more = normal(3, 30, 12, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = CorrelationAttention(24, 3).to(dtype)
    x = normal(2, 37, 24).to(dtype)
    got, want = layer(x), published(x, layer.state_dict(), 3, "qq+kk+vv")
    for a, b in zip(got, want, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a.double(), b, atol=3e-2, rtol=3e-2)


def test_each_level_agrees_bit_for_bit_with_itself_on_strided_input() -> None:
    fused = normal(2, 70, 3, 2, 24).permute(2, 0, 3, 1, 4)
    q, k, v = fused.unbind()
    for level in ("baseline", "avx2"):
        with cpu_capability(level):
            apart = attend_by_correlation(q.contiguous(), k.contiguous(), v.contiguous())
            assert torch.equal(attend_by_correlation(q, k, v), apart)


X = torch.zeros(2, 3, 5, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: attend_by_correlation(X[0], X, X), ValueError, r"q must be \[B, H, N, d\], got \[3, 5, 4\]"),
        (lambda: attend_by_correlation(X, X[..., :2], X), ValueError, r"k must be \[2, 3, 5, 4\] like q"),
        (lambda: attend_by_correlation(X, X, X[:, :, :2]), ValueError, r"v must be \[2, 3, 5, 'dv'\] like q"),
        (lambda: attend_by_correlation(X, X, X.half()), TypeError, "v must be torch.float32 like q, got torch.float16"),
        (lambda: attend_by_correlation(X.double(), X, X), TypeError, "q must be float32, bfloat16 or float16"),
        (lambda: attend_by_correlation(X, X, X, maps="qq+vk"), ValueError, "maps must be different ones of qk, qq, kk"),
        (lambda: attend_by_correlation(X, X, X, maps="qq+qq"), ValueError, r"joined by \+, got 'qq\+qq'"),
        (lambda: attend_by_correlation(X, X, X, scale=float("nan")), ValueError, "scale must be finite, got nan"),
        (lambda: attend_by_correlation(X[..., :0], X[..., :0], X), ValueError, "with d at least 1"),
        (lambda: attend_by_similarity(X[0], X[0, :2]), ValueError, r"values must be \[3, 5, 'C'\] like features"),
        (lambda: attend_by_similarity(X[0], X[0], gamma=0.0), ValueError, "gamma must be above 0 and finite, got 0.0"),
        (lambda: attend_by_similarity(X[0], X[0], beta=float("inf")), ValueError, "beta must be finite, got inf"),
        (lambda: attend_by_similarity(X, X[0]), ValueError, r"features must be \[B, M, D\]"),
        (lambda: CorrelationAttention(7, 2), ValueError, "dim must be a multiple of heads, got 7 and 2"),
        (lambda: CorrelationAttention(6, 2)(X[0]), ValueError, r"x must be \[B, N, 6\], got \[3, 5, 4\]"),
        (lambda: CorrelationAttention(4, 2).attend_from_features(X[0, :, :4], X), ValueError, r"1 \+ 1 \* 1"),
        (lambda: CorrelationAttention.from_attention(nn.Linear(2, 2)), ValueError, "q_proj, got Linear"),
    ],
)  # fmt: skip
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
