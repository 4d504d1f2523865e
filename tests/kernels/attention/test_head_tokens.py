"""DHVT's layers against their formulas unfolded, in float64, with every weight random."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.attention import ConvolutionalFeedForward, HeadTokenAttention, make_head_tokens
from planmill.kernels.attention.head_tokens.reference import head_token_attention_reference

# Names and shapes of the state dicts of ArieSeirack/DHVT (Apache-2.0), `HI_Attention(12, 3)` and `DAFF(12, 48)`.
ATTENTION = {
    "pos_embed": (1, 3, 12), "qkv.weight": (36, 12), "qkv.bias": (36,), "proj.weight": (12, 12), "proj.bias": (12,),
    "ht_proj.weight": (12, 4), "ht_proj.bias": (12,), "ht_norm.weight": (4,), "ht_norm.bias": (4,),
}  # fmt: skip
CONVOLUTIONS = {
    "conv1.weight": (48, 12, 1, 1), "conv1.bias": (48,), "conv2.weight": (48, 1, 3, 3), "conv2.bias": (48,),
    "conv3.weight": (12, 48, 1, 1), "conv3.bias": (12,), "compress.weight": (3, 12), "compress.bias": (3,),
    "excitation.weight": (12, 3), "excitation.bias": (12,),
    **{f"bn{i}.{name}": (width,) for i, width in ((1, 48), (2, 48), (3, 12))
       for name in ("weight", "bias", "running_mean", "running_var")},
    **{f"bn{i}.num_batches_tracked": () for i in (1, 2, 3)},
}  # fmt: skip


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    made = {name: 0.5 * normal(*shape, seed=index) for index, (name, shape) in enumerate(shapes.items())}
    return {name: value.abs() + 0.1 if "running_var" in name else value for name, value in made.items()}


def daff(x: torch.Tensor, w: dict[str, torch.Tensor], grid: tuple[int, int]) -> torch.Tensor:
    """The published steps in float64."""
    x, w = x.double(), {name: value.double() for name, value in w.items()}

    def norm(t: torch.Tensor, i: int) -> torch.Tensor:
        values = (w[f"bn{i}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias"))
        mean, var, scale, shift = values
        return (t - mean) / (var + 1e-5).sqrt() * scale + shift

    image = x[:, 1:].unflatten(1, grid).permute(0, 3, 1, 2)
    u = F.gelu(norm(F.conv2d(image, w["conv1.weight"], w["conv1.bias"]), 1))
    near = F.conv2d(u, w["conv2.weight"], w["conv2.bias"], padding=1, groups=u.shape[1])
    z = norm(F.conv2d(u + F.gelu(norm(near, 2)), w["conv3.weight"], w["conv3.bias"]), 3)
    gate = F.gelu(z.mean((2, 3)) @ w["compress.weight"].T + w["compress.bias"])
    gate = gate @ w["excitation.weight"].T + w["excitation.bias"]
    return torch.cat([x[:, :1] * gate[:, None], z.flatten(2).mT], 1)


@pytest.mark.parametrize("tokens", [1, 2, 26])
def test_attention_is_the_unfolded_formula(tokens: int) -> None:
    layer, weights = HeadTokenAttention(12, 3).eval(), weights_of(ATTENTION)
    layer.load_state_dict(weights)
    x = normal(2, tokens, 12, seed=50)
    with torch.no_grad():
        got = layer(x.transpose(0, 1).contiguous().transpose(0, 1))
        torch.testing.assert_close(got.double(), head_token_attention_reference(x, weights, 3), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer(x[1:]), got[1:], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("grid", [(5, 5), (3, 7), (1, 1)])
def test_feed_forward_is_the_published_one(grid: tuple[int, int]) -> None:
    layer, weights = ConvolutionalFeedForward(12), weights_of(CONVOLUTIONS)
    layer.load_state_dict(weights)
    x = normal(2, 1 + grid[0] * grid[1], 12, seed=50)
    with torch.no_grad():
        got = layer.eval()(x, None if grid[0] == grid[1] else grid)
        torch.testing.assert_close(got.double(), daff(x, weights, grid), atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(layer(x[1:], grid), got[1:], atol=1e-5, rtol=1e-5)


def test_training_uses_the_batch() -> None:
    """With the batch's own statistics as running ones, training and inference are the same layer."""
    layer = ConvolutionalFeedForward(12).train()
    layer.load_state_dict(weights_of(CONVOLUTIONS))
    for norm in (layer.bn1, layer.bn2, layer.bn3):
        norm.momentum = 1.0
    x = normal(8, 26, 12, seed=50)
    got = layer(x)
    got.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
    with torch.no_grad():  # running variances are unbiased
        torch.testing.assert_close(layer.eval()(x), got, atol=0.05, rtol=0.05)


def test_gradient_graph_and_export() -> None:
    model = torch.nn.Sequential(HeadTokenAttention(12, 3), ConvolutionalFeedForward(12)).eval()
    x = normal(2, 26, 12).requires_grad_()
    model[0](x).square().sum().backward()
    z = x.detach().double().requires_grad_()
    head_token_attention_reference(z, dict(model[0].named_parameters()), 3).square().sum().backward()
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-5, rtol=1e-4)  # type: ignore[union-attr]
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x.detach(),), dynamic_shapes=(({0: batch},)))
        more = normal(5, 26, 12, seed=3)
        torch.testing.assert_close(program.module()(more), model(more))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.12), (torch.float16, 0.015)])
def test_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    layer, exact = HeadTokenAttention(12, 3), HeadTokenAttention(12, 3)
    layer.load_state_dict(weights_of(ATTENTION))
    layer.to(dtype)
    exact.load_state_dict({name: value.float() for name, value in layer.state_dict().items()})
    x = normal(2, 26, 12, seed=50).to(dtype)
    assert layer(x).dtype == dtype
    torch.testing.assert_close(layer(x).float(), exact(x.float()), atol=tolerance, rtol=tolerance)


def head(x: torch.Tensor, **changes: torch.Tensor) -> torch.Tensor:
    shapes = {"weight": (12, 4), "bias": (12,), "norm_weight": (4,), "norm_bias": (4,), "positions": (3, 12)}
    return make_head_tokens(x, **{name: torch.ones(shape) for name, shape in shapes.items()} | changes)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: head(x[0]), ValueError, r"make_head_tokens: x must be \[B, N, C\], got \[5, 12\]"),
        (lambda x: head(x.double()), TypeError, "x must be float32, bfloat16 or float16"),
        (lambda x: head(x[:, :0]), ValueError, r"x must hold at least one token, got \[2, 0, 12\]"),
        (lambda x: head(x, bias=torch.ones(12).half()), TypeError, "bias must be torch.float32 like x"),
        (lambda x: head(x, positions=torch.ones(5, 12)), ValueError, r"positions must be \[H, 12\], H a divisor"),
        (lambda x: head(x, weight=torch.ones(12, 3)), ValueError, r"weight must be \[12, 4\], got \[12, 3\]"),
        (lambda x: HeadTokenAttention(12, 5), ValueError, "dim must be a multiple of heads = 5, got 12"),
        (lambda x: ConvolutionalFeedForward(12)(x[:, :4]), ValueError, r"N a square, or grid given, got \[2, 4, 12\]"),
        (lambda x: ConvolutionalFeedForward(8)(x), ValueError, r"x must be \[B, 1 \+ N, 8\], got \["),
        (lambda x: ConvolutionalFeedForward(12)(x, (2, 3)), ValueError, r"N 2 x 3, got \[2, 5, 12\]"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 5, 12))
