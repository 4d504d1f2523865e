"""Mixture of hidden dimensions against sums over slices; routing shared and own, fusion, compile, export, errors."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.routing import HiddenLinear, HiddenMixture, select_hidden
from planmill.kernels.routing.hidden_mixture.reference import sparse_input_reference, sparse_output_reference

SIZES = ((1, 1, 0, 1, 1, 1), (7, 5, 3, 4, 2, 6), (33, 17, 8, 6, 6, 4), (5, 9, 0, 5, 1, 3))  # T, other, Ds, G, K, g


def routing(generator: torch.Generator, tokens: int, groups: int, active: int) -> tuple[torch.Tensor, torch.Tensor]:
    indices = torch.rand(tokens, groups, generator=generator).argsort(1)[:, :active].int()
    return indices, torch.rand(tokens, active, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear_maps_are_sums_over_slices(
    sizes: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    tokens, other, shared, groups, active, g = sizes
    width, c = shared + groups * g, 1.75
    indices, weights = routing(generator, tokens, groups, active)
    x, w = normal(generator, dtype, tokens, width), normal(generator, dtype, other, width)
    atol, rtol = (1e-5, 1e-5) if dtype is torch.float32 else (0.2, 2e-2)
    got = F.linear(select_hidden(x, indices, weights, shared, groups, scale=c), w)
    want = sparse_input_reference(x, w, indices, weights, shared, groups, c)
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=rtol)
    h, w = normal(generator, dtype, tokens, other), normal(generator, dtype, width, other)
    got = select_hidden(F.linear(h, w), indices, weights, shared, groups, scale=c)
    assert got.dtype is dtype
    want = sparse_output_reference(h, w, indices, weights, shared, groups, c)
    torch.testing.assert_close(got.double(), want, atol=atol, rtol=rtol)
    torch.testing.assert_close(select_hidden(strided(x), indices.long(), weights, shared, groups, scale=c),
                               select_hidden(x, indices, weights, shared, groups, scale=c))  # fmt: skip


def test_groups_that_were_not_chosen_are_not_read(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 2, 3, 2 + 4 * 3)
    indices = torch.tensor([3, 0]).expand(2, 3, 2).clone()
    indices[1, 2, 1] = -1
    weights = torch.rand(2, 3, 2, generator=generator)
    poisoned = x.clone()
    poisoned[..., 5:11] = torch.nan  # groups 1 and 2
    y = select_hidden(poisoned, indices, weights, 2, 4)
    assert torch.equal(y, select_hidden(x, indices, weights, 2, 4))
    assert not y[..., 5:11].any()
    assert not y[1, 2, 2:5].any()  # dropped
    torch.testing.assert_close(y[0, 1, 11:], weights[0, 1, 0] * x[0, 1, 11:])


@pytest.mark.parametrize("score", ["sigmoid", "softmax"])
@pytest.mark.parametrize("sparse", ["input", "output"])
def test_layer(sparse: str, score: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"shared": 4, "groups": 5, "active": 2}
    layer = HiddenLinear(14, 24, sparse=sparse, score=score, **sizes)
    x = normal(generator, torch.float32, 3, 6, 14)
    logits = layer.router(x).flatten(0, 1)
    p = (logits.double().sigmoid() if score == "sigmoid" else logits.double().softmax(1)).float()
    weights, indices = p.topk(2, 1)
    reference = sparse_input_reference if sparse == "input" else sparse_output_reference
    c = 14 / 8 if sparse == "input" else 24 / 12
    assert layer.scale == c
    want = reference(x.flatten(0, 1), layer.weight.detach(), indices, weights, 4, 5, c)
    torch.testing.assert_close(layer(x).flatten(0, 1).double(), want, atol=1e-5, rtol=1e-5)
    found = layer.route(x)
    assert torch.equal(found[0].flatten(0, 1).long(), indices)
    assert torch.equal(layer(x, found), layer(x))
    torch.testing.assert_close(layer(x)[1:2, 3:4], layer(x[1:2, 3:4]))  # a token alone
    plain = HiddenLinear(14, 24, sparse=sparse, score=score, scaled=False, **sizes)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(plain(x) * c, layer(x))


def test_ties_and_nan_in_the_router(generator: torch.Generator) -> None:
    layer = HiddenLinear(6, 8, sparse="input", shared=1, groups=5, active=3)
    with torch.no_grad():
        layer.router.weight.copy_(torch.tensor([0.0, 1, 0, 1, 0])[:, None] * torch.ones(6))
    x = torch.ones(1, 6)
    assert layer.route(x)[0].tolist() == [[1, 3, 0]]
    with torch.no_grad():
        layer.router.weight[3, 0] = torch.nan
    indices, weights = layer.route(x)
    assert indices.tolist() == [[1, 0, 2]]
    assert bool(weights.isfinite().all())
    assert bool(layer(x).isfinite().all())


def test_all_groups_with_weight_one_are_a_plain_linear(generator: torch.Generator) -> None:
    layer = HiddenLinear(14, 9, sparse="input", shared=4, groups=5, active=5)
    x = normal(generator, torch.float32, 6, 14)
    indices = torch.arange(5).expand(6, 5)
    torch.testing.assert_close(layer(x, (indices, torch.ones(6, 5))), F.linear(x, layer.weight))


def test_fusion_fills_groups_from_the_chosen_ones(generator: torch.Generator) -> None:
    layer = HiddenLinear(6, 2 + 3 * 4, sparse="output", shared=2, groups=3, active=1, fusion=True)
    x = normal(generator, torch.float32, 5, 6)
    before = layer(x)
    assert bool((before[:, 2:].unflatten(1, (3, 4)).any(2).sum(1) == 1).all())  # the identity at the start
    with torch.no_grad():
        layer.fusion.copy_(torch.tensor([[1.0, 0, 0], [0.5, 1, 0], [0, 0, 1]]))
    after, chosen = layer(x), layer.route(x)[0][:, 0]
    torch.testing.assert_close(after[:, 6:10], before[:, 6:10] + 0.5 * before[:, 2:6])
    assert torch.equal(after[chosen != 0], before[chosen != 0])


def test_block(generator: torch.Generator) -> None:
    torch.manual_seed(0)
    block = HiddenMixture(4 + 5 * 2, 11, shared=4, groups=5, active=2)
    with torch.no_grad():
        block.down.fusion.copy_(torch.randn(5, 5, generator=generator))
    x = normal(generator, torch.float32, 2, 3, 14)
    weights, indices = block.gate_up.router(x[1, 2:]).sigmoid().topk(2, 1)
    up = block.gate_up.weight.detach()
    z = sparse_input_reference(x[1, 2:], up, indices, weights, 4, 5, 14 / 8)
    h = F.silu(z[:, :11]) * z[:, 11:]
    y = sparse_output_reference(h, block.down.weight.detach(), indices, weights, 4, 5, 14 / 8)
    fused = block.down.fusion.detach().double() @ y[0, 4:].view(5, 2)
    want = torch.cat([y[0, :4], fused.flatten()])
    torch.testing.assert_close(block(x)[1, 2].double(), want, atol=1e-5, rtol=1e-5)
    assert block(x[:0]).shape == (0, 3, 14)


def test_gradients(generator: torch.Generator) -> None:
    """Every parameter learns, and the gradient is that of the definition in float64."""
    indices, weights = routing(generator, 7, 5, 2)
    x, w = normal(generator, torch.float32, 7, 14).requires_grad_(), normal(generator, torch.float32, 3, 14)
    weights.requires_grad_()
    F.linear(select_hidden(x, indices, weights, 4, 5, scale=1.5), w).square().sum().backward()
    x64, a64 = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    sparse_input_reference(x64, w, indices, a64, 4, 5, 1.5).square().sum().backward()
    assert x64.grad is not None
    assert a64.grad is not None
    torch.testing.assert_close(x.grad, x64.grad.float(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(weights.grad, a64.grad.float(), atol=1e-4, rtol=1e-4)
    block = HiddenMixture(14, 6, shared=4, groups=5, active=2)
    block(normal(generator, torch.float32, 40, 14)).square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()), name


def test_compiles_and_exports_with_a_dynamic_batch(generator: torch.Generator) -> None:
    torch.compiler.reset()
    block, x = HiddenMixture(14, 6, shared=4, groups=5, active=2).eval(), normal(generator, torch.float32, 3, 4, 14)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="aot_eager")(x), block(x))
    program = torch.export.export(block, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    other = normal(generator, torch.float32, 5, 4, 14)
    torch.testing.assert_close(program.module()(other), block(other))


X, I, A = torch.zeros(3, 14), torch.zeros(3, 2, dtype=torch.int32), torch.zeros(3, 2)  # noqa: E741
SIZE: dict[str, Any] = {"sparse": "input", "shared": 4, "groups": 5, "active": 2}


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: select_hidden(X, I, A, 3, 5),
            ValueError,
            r"D = shared \+ groups \* g .*, got \[3, 14\] with shared=3",
        ),
        (lambda: select_hidden(X, I, A, 14, 5), ValueError, "shared=14 and groups=5"),
        (lambda: select_hidden(X.int(), I, A, 4, 5), TypeError, "x must be float32, bfloat16 or float16"),
        (
            lambda: select_hidden(X, I[:2], A[:2], 4, 5),
            ValueError,
            r"indices and weights must be \[3, 'K'\], got \[2, 2\]",
        ),
        (lambda: select_hidden(X, I, A[:, :1], 4, 5), ValueError, r"got \[3, 2\] and \[3, 1\]"),
        (lambda: select_hidden(X, I.short(), A, 4, 5), TypeError, "indices must be int32 or int64, got torch.int16"),
        (lambda: select_hidden(X, I, A.half(), 4, 5), TypeError, "weights must be float32, got torch.float16"),
        (lambda: HiddenLinear(14, 3, **{**SIZE, "sparse": "both"}), ValueError, "sparse must be one of input, output"),
        (
            lambda: HiddenLinear(14, 3, **{**SIZE, "shared": 5}),
            ValueError,
            r"the 14 input dimensions must be shared \+",
        ),
        (lambda: HiddenLinear(14, 3, **{**SIZE, "active": 6}), ValueError, "active must be 1 to 5 groups, got 6"),
        (lambda: HiddenLinear(14, 3, **SIZE, fusion=True), ValueError, "fusion needs sparse='output'"),
        (lambda: HiddenLinear(14, 3, **SIZE, score="tanh"), ValueError, "score must be one of softmax, sigmoid"),
        (lambda: HiddenLinear(14, 3, **SIZE, router=False)(X), ValueError, "made without a router"),
        (
            lambda: HiddenMixture(14, 3, shared=4, groups=5, active=2, activation="x"),
            ValueError,
            "activation must be one",
        ),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
