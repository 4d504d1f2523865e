"""LinearAttention against the published formulas, attend_linearly on random draws, long sequences, and messages."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.attention import LinearAttention, attend_linearly
from planmill.kernels.attention.linear_attention.compare import compare


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AttentionLayer(nn.Module):
    """Projections named as those of fast-transformers (MIT), and its formula restated in the dtype of x."""

    def __init__(self, dim: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.inner_attention = type("CausalLinearAttention" if causal else "LinearAttention", (nn.Module,), {})()
        self.inner_attention.eps = 1e-6
        self.n_heads = heads
        self.query_projection, self.key_projection = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.value_projection, self.out_projection = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x: torch.Tensor, length: int) -> torch.Tensor:
        q, k, v = (
            p(x).unflatten(2, (self.n_heads, -1))
            for p in (self.query_projection, self.key_projection, self.value_projection)
        )
        q, k = F.elu(q) + 1, (F.elu(k) + 1) * (torch.arange(x.shape[1]) < length)[:, None, None]
        weights = torch.einsum("blhd,bmhd->bhlm", q, k)
        if type(self.inner_attention).__name__.startswith("Causal"):
            weights = weights.tril()
        o = torch.einsum("bhlm,bmhe->blhe", weights / (weights.sum(-1, keepdim=True) + 1e-6), v)
        return self.out_projection(o.flatten(2))


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_equals_fast_transformers(causal: bool) -> None:
    """Oracle: the formulas of idiap/fast-transformers (MIT), quadratic, in float64."""
    theirs = AttentionLayer(24, 3, causal)
    mine = LinearAttention.from_fast_transformers(theirs)
    assert mine.causal == causal
    x, mask = normal(2, 67, 24), (torch.arange(67) < 50).expand(2, 67)
    want = theirs.double()(x.double(), 50)
    torch.testing.assert_close(mine(x, mask).double(), want, atol=1e-5, rtol=1e-5)
    again = LinearAttention.from_fast_transformers(theirs.float().state_dict(), 3, causal=causal)
    assert torch.equal(again(x, mask), mine(x, mask))
    loaded = LinearAttention(24, 3, value_dim=48, causal=causal)
    loaded.load_state_dict(theirs.state_dict())
    assert torch.equal(loaded(x, mask), mine(x, mask))


@pytest.mark.parametrize("normalize", [False, True], ids=["norm", "both"])
def test_equals_flash_linear_attention(normalize: bool) -> None:
    """Oracle: the formulas of fla-org/flash-linear-attention (MIT), step by step, in float64."""
    state = {f"{p}_proj.weight": normal(24, 24, seed=i) * 0.2 for i, p in enumerate("qkvo")}
    state["norm.weight"] = normal(8, seed=9)
    mine = LinearAttention.from_fla(state, 3, feature_map="relu", normalize=normalize)
    x = normal(2, 53, 24)
    q, k, v = (F.linear(x.double(), state[f"{p}_proj.weight"].double()).unflatten(2, (3, 8)) for p in "qkv")
    memory, total, outs = torch.zeros(2, 3, 8, 8).double(), torch.zeros(2, 3, 8).double(), []
    for t in range(53):
        r = q[:, t].relu() * 8**-0.5
        memory = memory + k[:, t].relu()[..., None] * v[:, t, :, None]
        total = total + k[:, t].relu()
        o = torch.einsum("bhd,bhde->bhe", r, memory)
        outs.append(o / ((r * total).sum(-1, keepdim=True) + 1e-10) if normalize else o)
    o = torch.stack(outs, 1)
    o = o * (o.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * state["norm.weight"]
    want = F.linear(o.flatten(2), state["o_proj.weight"].double())
    torch.testing.assert_close(mine(x).double(), want, atol=2e-5, rtol=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("tokens", [70, 2100], ids=["short", "split"])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(causal: bool, tokens: int) -> None:
    q, k, v = (normal(3, 2, tokens, 12, seed=i) for i in range(3))
    together = attend_linearly(q, k, v, causal=causal)
    assert torch.equal(attend_linearly(*(x[1:2] for x in (q, k, v)), causal=causal), together[1:2])
    one_head = attend_linearly(*(x[1:2, 1:] for x in (q, k, v)), causal=causal)  # split among threads where long
    assert torch.equal(one_head, together[1:2, 1:])
    k[0], v[2] = torch.nan, torch.inf
    assert torch.equal(attend_linearly(q, k, v, causal=causal)[1], together[1])


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_65536_tokens(causal: bool) -> None:
    """The sums of 65536 keys keep float32's accuracy, against running sums in float64."""
    q, k, v = (normal(1, 1, 65536, 8, seed=i) for i in range(3))
    f, g = F.elu(q.double()) + 1, F.elu(k.double()) + 1
    memory = (g[..., None] * torch.cat((v, torch.ones_like(v[..., :1])), -1)[..., None, :]).cumsum(2)
    o = torch.einsum("bhnd,bhnde->bhne", f, memory if causal else memory[:, :, -1:].expand_as(memory))
    want = o[..., :-1] / (o[..., -1:] + 1e-6)
    torch.testing.assert_close(attend_linearly(q, k, v, causal=causal).double(), want, atol=1e-6, rtol=1e-6)


def test_causal_tokens_do_not_see_later_ones() -> None:
    q, k, v = (normal(1, 2, 130, 9, seed=i) for i in range(3))
    before = attend_linearly(q, k, v, causal=True)
    k[:, :, 77:], v[:, :, 77:], q[:, :, 77:] = torch.nan, torch.nan, torch.nan
    assert torch.equal(attend_linearly(q, k, v, causal=True)[:, :, :77], before[:, :, :77])


def test_no_weights_give_zero() -> None:
    q, k, v = normal(1, 1, 5, 4), -normal(1, 1, 5, 4).abs(), normal(1, 1, 5, 4)
    assert not attend_linearly(q, k, v, feature_map="relu").any()
    assert not attend_linearly(q, k, v, mask=torch.zeros(1, 5, dtype=torch.bool)).any()
    assert not attend_linearly(q, k[:, :, :0], v[:, :, :0]).any()


def test_gradient_and_one_graph() -> None:
    """Gradients of every parameter against the quadratic form, torch.compile(fullgraph=True), export of any length."""
    theirs = AttentionLayer(8, 2, causal=True)
    layer = LinearAttention.from_fast_transformers(theirs)
    x = normal(2, 7, 8).requires_grad_()
    layer(x).square().sum().backward()
    z = x.detach().double().requires_grad_()
    theirs.double()(z, 7).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-4, rtol=1e-4)
    for mine, published in zip(layer.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), published.grad, atol=1e-4, rtol=1e-3)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        tokens = torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({1: tokens},))
        more = normal(2, 150, 8, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.usefixtures("two_threads")
def test_random_inputs() -> None:
    """Random sizes, layouts, kinds of data, masks and settings on every level against the definition."""
    spec = kernels.ops()["linear_attention"]
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: Any) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        causal, dtype = pick(True, False), pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
        batch, heads, tokens = pick(1, 3), pick(1, 2, 5), pick(1, 2, 31, 47, 48, 49, 97, 200)
        keys = tokens if causal else pick(1, 48, 49, 300)
        width, values = pick(1, 3, 7, 8, 9, 16, 31, 33, 64), pick(1, 2, 7, 8, 16, 17, 33, 64)
        mean, scale = pick(0, 0, 0, 5, -20), pick(1e-6, 0.1, 1, 1, 10)
        q, k, v = (
            (torch.randn(batch, heads, *size, generator=g) * scale + mean).to(dtype)
            for size in ((tokens, width), (keys, width), (keys, values))
        )
        if pick(False, False, False, True):
            k[:, :, keys // 2, 0] = torch.nan
        if pick(False, False, False, True):
            v[0, 0, keys // 2, 0] = torch.nan
        if pick(False, True):
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        mask = torch.rand(batch, keys, generator=g) < pick(0.1, 0.9) if pick(0, 1) else torch.empty(0).bool()
        feature_map = pick("elu", "relu", "squared_relu", "identity")
        normalize = feature_map != "identity" and pick(False, True)
        args = (q, k, v, mask, feature_map, normalize, causal, pick(1.0, width**-0.5), pick(1e-6, 1e-10))
        want = spec.reference(*args)
        if want.isinf().any():  # float16 without normaliser
            continue
        print(f"seed {seed}: {list(q.shape)}, {list(v.shape)}, {args[4:]}")  # shown by pytest where it fails
        with kernels.cpu_capability(pick(*kernels.cpu_capabilities())):
            compare(args, (spec.op(*args),), (want,), *spec.tolerances[dtype])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: attend_linearly(x[0], x, x), ValueError, r"q must be \[B, H, N, D\], got \[2, 5, 8\]"),
        (lambda x: attend_linearly(x, x[..., :4], x), ValueError, r"k must be \[1, 2, M, 8\] like q, got"),
        (lambda x: attend_linearly(x, x, x[:, :, :3]), ValueError, r"v must be \[1, 2, 5, E\] like k, got"),
        (
            lambda x: attend_linearly(x[..., :0], x, x),
            ValueError,
            r"q must be .* with D at least 1, got \[1, 2, 5, 0\]",
        ),
        (lambda x: attend_linearly(x.double(), x, x), TypeError, "q must be float32.* got torch.float64"),
        (lambda x: attend_linearly(x, x.half(), x), TypeError, "k must be torch.float32 like q, got torch.float16"),
        (lambda x: attend_linearly(x[:, :, :2], x, x, causal=True), ValueError, "k must have the 2 tokens of q"),
        (lambda x: attend_linearly(x, x, x, feature_map="cos"), ValueError, "feature_map must be one of elu, relu"),
        (lambda x: attend_linearly(x, x, x, eps=0.0), ValueError, "eps must be at least 1e-37, got 0.0"),
        (lambda x: attend_linearly(x, x, x, mask=x[0, :1, :, 0]), TypeError, "mask must be bool, got torch.float32"),
        (lambda x: attend_linearly(x, x, x, mask=x[..., 0] > 0), ValueError, r"mask must be \[1, 5\], \[B, M\] of k"),
        (lambda x: LinearAttention(8, 3), ValueError, "heads must divide key_dim and value_dim, got 3, 8, 8"),
        (lambda x: LinearAttention(8, 2)(x), ValueError, r"x must be \[B, N, 8\], got \[1, 2, 5, 8\]"),
        (lambda x: LinearAttention(8, 2, feature_map="cos"), ValueError, "feature_map must be one of elu"),
        (lambda x: LinearAttention.from_fla({}, feature_map="elu"), ValueError, "heads must be given with a state"),
        (lambda x: LinearAttention.from_fla({"a": x}, 2, feature_map="elu"), ValueError, "missing: q_proj, .* over: a"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(1, 2, 5, 8))
