"""INP-Former's blocks against the published formulas with nothing folded, restated in float64."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels import ops
from planmill.kernels.attention import PrototypeAttention, PrototypeBlock, PrototypeExtractor, mix_prototypes


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def published(block: nn.Module, x: torch.Tensor, y: torch.Tensor, heads: int) -> torch.Tensor:
    """Oracle: Prototype_Block and Aggregation_Block of INP-Former (MIT), from their formulas, q k and v all made."""
    w = {name: p.double() for name, p in block.state_dict().items()}
    x, y = x.double(), y.double()

    def norm(z: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(z, z.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-8)

    def linear(z: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(z, w[f"{name}.weight"], w[f"{name}.bias"])

    batch, tokens, dim = x.shape
    q = linear(norm(x, "norm1"), "attn.q").view(batch, tokens, heads, dim // heads).transpose(1, 2)
    kv = linear(norm(y, "norm1"), "attn.kv").view(batch, y.shape[1], 2, heads, dim // heads).permute(2, 0, 3, 1, 4)
    k, v = kv.unbind()
    if "attn.learn_scale" in w:
        a = F.relu((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT) * w["attn.learn_scale"])
    else:
        a = (q @ k.mT * (dim // heads) ** -0.5).softmax(-1)
    t = linear((a @ v).transpose(1, 2).reshape(batch, tokens, dim), "attn.proj")
    if "attn.learn_scale" not in w:
        t = x + t
    return t + linear(F.gelu(linear(norm(t, "norm2"), "mlp.fc1")), "mlp.fc2")


def random_parameters(module: nn.Module) -> nn.Module:
    """Norms and scales are ones when new: a parameter that no test would miss."""
    for index, parameter in enumerate(module.parameters()):
        parameter.data = parameter.data + 0.3 * normal(*parameter.shape, seed=index)
    return module.eval()


@pytest.mark.parametrize("batch", [1, 3])
def test_decoder_block_equals_the_published_one(batch: int) -> None:
    block = random_parameters(PrototypeBlock(24, 3))
    x, p = normal(batch, 37, 24), normal(batch, 6, 24, seed=1)
    torch.testing.assert_close(block(x, p).double(), published(block, x, p, 3), atol=2e-5, rtol=2e-5)


def test_extractor_equals_the_published_one() -> None:
    block = random_parameters(PrototypeExtractor(24, 3))
    p, y = normal(6, 24), normal(3, 50, 24, seed=1)
    got, want = block(p, y), published(block, p.expand(3, -1, -1), y, 3)
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(block(p.expand(3, -1, -1), y), got)


def test_parameters_have_the_published_names() -> None:
    shared = {f"{a}.{b}" for a in ("norm1", "norm2", "attn.q", "attn.kv", "attn.proj", "mlp.fc1", "mlp.fc2")
              for b in ("weight", "bias")}  # fmt: skip
    assert set(PrototypeExtractor(8, 2).state_dict()) == shared
    assert set(PrototypeBlock(8, 2).state_dict()) == shared | {"attn.learn_scale"}
    assert PrototypeBlock(8, 2).attn.learn_scale.shape == (2, 1, 1)


def test_tokens_away_from_all_prototypes_get_the_bias() -> None:
    layer = PrototypeAttention(8, 2)
    layer.learn_scale.data.fill_(-1.0)
    k = F.linear(normal(1, 1, 8), layer.kv.weight, layer.kv.bias)[..., :8]
    q = k.view(1, 1, 2, 4).expand(1, 5, 2, 4)
    out = mix_prototypes(q, k.view(1, 2, 1, 4), normal(1, 2, 8), layer.learn_scale.flatten(), layer.proj.bias)
    torch.testing.assert_close(out, layer.proj.bias.expand(1, 5, 8), atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """LayerNorm's eps of 1e-8 is 0 in float16: a constant token must not divide by it in 16 bits."""
    for block in (
        random_parameters(PrototypeBlock(24, 3)).to(dtype),
        random_parameters(PrototypeExtractor(24, 3)).to(dtype),
    ):
        x, y = normal(2, 9, 24).to(dtype), normal(2, 30, 24, seed=1).to(dtype)
        x[0, 3] = 0.25
        got = block(x, y)
        assert got.dtype == dtype
        want = published(block, x, y, 3)
        torch.testing.assert_close(got.double(), want, atol=0.03 * float(want.abs().max()), rtol=0.03)


@pytest.mark.usefixtures("two_threads")
def test_a_sample_alone_is_the_sample_in_a_batch() -> None:
    """To the bit in the kernel; the projections are the library's, whose products may differ by their size."""
    args = ops()["prototype_attention"].cases()[4].make(torch.float32, torch.Generator().manual_seed(0))
    q, keys, table, tau, bias = (torch.cat([a, a.flip(1), a]) if a.dim() > 1 else a for a in args)
    together = mix_prototypes(q, keys, table, tau, bias)
    assert torch.equal(together[1:2], mix_prototypes(q[1:2], keys[1:2], table[1:2], tau, bias))
    block, extractor = random_parameters(PrototypeBlock(24, 3)), random_parameters(PrototypeExtractor(24, 3))
    x, p = normal(3, 37, 24), normal(3, 6, 24, seed=1)
    want, pooled = block(x[1:2], p[1:2]), extractor(p[1:2], x[1:2])
    x[0], p[2] = torch.nan, torch.nan
    torch.testing.assert_close(block(x, p)[1:2], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(extractor(p, x)[1:2], pooled, atol=1e-5, rtol=1e-5)


def test_random_shapes() -> None:
    spec = ops()["prototype_attention"]
    for seed in range(150):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: Any) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        batch, tokens, heads, d = pick(1, 2), pick(1, 5, 24, 25, 50), pick(1, 2, 5), pick(1, 4, 9, 16, 33, 64)
        m, c = pick(0, 1, 6, 15, 16, 17, 40), pick(1, 7, 64, 65, 200)
        scale = pick(1e-9, 1e-3, 1, 1e4)
        shapes = ([batch, tokens, heads, d], [batch, heads, m, d], [batch, heads * m, c], [heads], [c])
        q, keys, table, tau, bias = (torch.randn(*shape, generator=g) for shape in shapes)
        args = (q * scale, keys * pick(1, 1e-6), table, tau, bias)
        if pick(0, 0, 1):
            args[0][0, 0, 0] = pick(0.0, torch.nan)
        print(f"seed {seed}: {shapes}")  # shown by pytest where it fails
        torch.testing.assert_close(spec.op(*args), spec.reference(*args), atol=5e-5, rtol=2e-5, equal_nan=True)


@pytest.mark.parametrize("kind", [PrototypeBlock, PrototypeExtractor])
def test_gradient_one_graph_and_export(kind: type) -> None:
    block = random_parameters(kind(12, 2))
    x, y = normal(2, 9, 12), normal(2, 6, 12, seed=1)
    mine, theirs = [t.clone().requires_grad_() for t in (x, y)], [t.double().requires_grad_() for t in (x, y)]
    block(*mine).square().sum().backward()
    published(block, theirs[0], theirs[1], 2).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-3, rtol=1e-3)
    assert all(parameter.grad is not None for parameter in block.parameters())
    with torch.no_grad():
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, y), block(x, y))
        batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=2, max=4096)
        program = torch.export.export(block, (x, y), dynamic_shapes=({0: batch, 1: tokens}, {0: batch}))
        more = normal(5, 20, 12, seed=3), normal(5, 6, 12, seed=4)
        torch.testing.assert_close(program.module()(*more), block(*more), atol=1e-5, rtol=1e-5)


Q = torch.zeros(2, 5, 3, 4)
K = torch.zeros(2, 3, 6, 4)
R = torch.zeros(2, 18, 7)
T, B = torch.ones(3), torch.zeros(7)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: mix_prototypes(Q[0], K, R, T, B), ValueError, r"q must be \[B, N, H, d\], got \[5, 3, 4\]"),
        (lambda: mix_prototypes(Q, K[:, :2], R, T, B), ValueError, r"keys must be \[2, 3, M, 4\] like q"),
        (lambda: mix_prototypes(Q, K, R[:, :9], T, B), ValueError, r"table must be \[2, 18, C\] like keys"),
        (lambda: mix_prototypes(Q, K, R, T[:2], B), ValueError, r"tau must be \[3\], got \[2\]"),
        (lambda: mix_prototypes(Q, K, R, T, B[:2]), ValueError, r"bias must be \[7\] like table, got \[2\]"),
        (lambda: mix_prototypes(Q, K, R, T.half(), B), TypeError, "tau must be torch.float32 like q"),
        (lambda: mix_prototypes(Q[..., :0], K[..., :0], R, T, B), ValueError, "with d at least 1"),
        (lambda: PrototypeAttention(7, 2), ValueError, "dim must be a multiple of heads, got 7 and 2"),
        (lambda: PrototypeAttention(8, 2)(R, R), ValueError, r"x must be \[B, N, 8\], got \[2, 18, 7\]"),
        (lambda: PrototypeAttention(7, 1)(R, Q), ValueError, r"prototypes must be \[B, M, 7\], got \[2, 5, 3, 4\]"),
        (lambda: PrototypeBlock(8, 2)(R, R), ValueError, r"PrototypeBlock: x must be \[B, N, 8\], got \[2, 18, 7\]"),
        (lambda: PrototypeExtractor(8, 2)(B, R), ValueError, r"y must be \[B, N, 8\], got \[2, 18, 7\]"),
        (lambda: PrototypeExtractor(7, 1)(B, R), ValueError, r"prototypes must be \[M, 7\], got \[7\]"),
    ],
)  # fmt: skip
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
