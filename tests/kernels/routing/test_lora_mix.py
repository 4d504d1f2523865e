"""LoraMix against the published ten calls, merged weights, random draws, and the messages."""

import pytest
import torch
from torch import nn

from planmill.kernels import ops
from planmill.kernels.routing import LoraMix, mix_adapters


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(inputs: int = 24, outputs: int = 36, n: int = 2, rank: int = 4, scale: float = 0.5) -> LoraMix:
    adapters = [(normal(rank, inputs, seed=i), normal(outputs, rank, seed=9 + i)) for i in range(n)]
    return LoraMix.from_linear(nn.Linear(inputs, outputs), adapters, scale=scale)


def published(x: torch.Tensor, layer: LoraMix, alpha: torch.Tensor) -> torch.Tensor:
    """PETALface's layer (MIT), restated in float64: each adapter takes its own scaled copy of x."""
    x, alpha = x.double(), alpha.double().view(-1, *[1] * (x.dim() - 1))
    w, b = layer.weight.double(), layer.bias.double()
    (a1, a2), (b1, b2) = layer.down.double(), layer.up.double()
    first = ((x * (1 - alpha)) @ a1.T) @ b1
    second = ((x * alpha) @ a2.T) @ b2
    return x @ w.T + b + layer.scale * first + layer.scale * second


def test_equals_the_published_calls() -> None:
    layer, x, alpha = made(), normal(5, 7, 24), torch.tensor([0.0, 1.0, 0.4, -0.3, 1.7])
    with torch.no_grad():
        torch.testing.assert_close(layer(x, alpha).double(), published(x, layer, alpha), atol=2e-5, rtol=1e-5)
        omega = torch.stack([1 - alpha, alpha], 1)
        assert torch.equal(layer(x, omega), layer(x, alpha))
        flat = layer(x[:, 0], alpha)  # [B, I]: one token a sample
        torch.testing.assert_close(flat, layer(x, alpha)[:, 0], atol=1e-5, rtol=1e-5)


def test_alpha_of_zero_and_one_is_one_adapter() -> None:
    layer, x = made(), normal(2, 6, 24)
    for alpha, i in ((0.0, 0), (1.0, 1)):
        alone = LoraMix.from_linear(
            nn.Linear(24, 36), [(layer.down[i], layer.up[i].T)], scale=layer.scale
        )  # another base: replaced below
        alone.weight, alone.bias = layer.weight, layer.bias
        got = layer(x, torch.full((2,), alpha))
        torch.testing.assert_close(got, alone(x, torch.ones(2, 1)), atol=1e-5, rtol=1e-5)


def test_windows_share_the_weights_of_their_image() -> None:
    layer, alpha = made(), torch.tensor([0.2, 0.9, -0.5])
    x = normal(3 * 4, 5, 24)
    want = layer(x, alpha.repeat_interleave(4))
    torch.testing.assert_close(layer(x, alpha), want, atol=1e-6, rtol=1e-6)
    grid = layer(x.view(12, 5, 1, 24), alpha)
    assert torch.equal(grid.view(12, 5, 36), layer(x, alpha))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_give_the_same(dtype: torch.dtype) -> None:
    layer = made().to(dtype)
    x = normal(3, 6, 24).to(dtype)
    merged = layer.merge(0.3)
    assert type(merged) is nn.Linear
    exact = published(x, layer, torch.full((3,), 0.3))
    tolerance = 2e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(merged(x).double(), exact, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(layer(x, torch.full((3,), 0.3)).double(), exact, atol=tolerance, rtol=tolerance)
    again = made(n=3).merge(torch.tensor([0.5, -1.0, 2.0]))
    assert again.weight.shape == (36, 24)


def test_a_sample_does_not_touch_another() -> None:
    layer, x, alpha = made(), normal(3, 5, 24), torch.tensor([0.1, 0.5, 0.8])
    alone = layer(x[1:2], alpha[1:2])
    x[0], x[2, 1], alpha[2] = torch.nan, torch.inf, torch.nan
    torch.testing.assert_close(layer(x, alpha)[1:2], alone, atol=1e-6, rtol=1e-6)


def test_gradient_of_every_argument() -> None:
    layer, x = made(), normal(3, 5, 24).requires_grad_()
    alpha = torch.tensor([0.1, 0.5, 1.2], requires_grad=True)
    weights = normal(3, 5, 36, seed=3)
    names = ["x", "alpha", *(name for name, _ in layer.named_parameters())]
    inputs = [x, alpha, *layer.parameters()]
    got = torch.autograd.grad((layer(x, alpha) * weights).sum(), inputs)
    want = torch.autograd.grad((published(x, layer, alpha) * weights).sum(), inputs)
    for name, a, b in zip(names, got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4, msg=name)
    layer.weight.requires_grad_(False)
    (layer(x, alpha) * weights).sum().backward()
    assert layer.weight.grad is None
    torch.testing.assert_close(layer.down.grad, want[names.index("down")], atol=1e-4, rtol=1e-4)


def test_one_graph_and_a_dynamic_batch() -> None:
    layer, x, alpha = made().eval(), normal(3, 5, 24), torch.tensor([0.1, 0.5, 0.8])
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, alpha), layer(x, alpha))
        batch = torch.export.Dim("batch", min=2, max=64)
        program = torch.export.export(layer, (x, alpha), dynamic_shapes=({0: batch}, {0: batch}))
        more, other = normal(7, 5, 24, seed=3), torch.rand(7)
        torch.testing.assert_close(program.module()(more, other), layer(more, other))


def test_random_draws() -> None:
    """Random sizes, strides and scales against the definition."""
    spec = ops()["lora_mixture"]
    assert spec.compare is not None
    for seed in range(80):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: float) -> float:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        batch, tokens, n, rank = int(pick(1, 2, 5)), int(pick(1, 3, 4, 17, 40)), int(pick(1, 2, 3)), int(pick(1, 4, 8))
        inputs, outputs = int(pick(1, 8, 33)), int(pick(1, 7, 8, 16, 31, 255, 257, 300))
        dtype = (torch.float32, torch.bfloat16, torch.float16)[int(pick(0, 1, 2))]
        size = pick(1e-4, 1, 1, 30)
        shapes = ((batch, tokens, inputs), (outputs, inputs), (outputs,), (n, rank, inputs), (n, rank, outputs))
        tensors = [(torch.randn(s, generator=g) * (size if i == 0 else 1)).to(dtype) for i, s in enumerate(shapes)]
        if pick(0, 0, 1):
            tensors[0][0, 0, 0] = torch.nan
        if pick(0, 1):
            tensors[2] = tensors[2].new_empty(0)
        args = (*tensors, torch.randn(batch, n, generator=g), pick(1.0, 0.25, -2.0))
        print(f"seed {seed}: {shapes} {dtype}")  # shown by pytest where the comparison fails
        spec.compare(args, (spec.op(*args),), (spec.reference(*args),), *spec.tolerances[dtype])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": normal(6)}, ValueError, r"lora_mixture: x must be \[M, ..., I\], got \[6\]"),
        ({"x": normal(4, 3, 6).double()}, TypeError, "x must be float32, bfloat16 or float16, got torch.float64"),
        ({"x": normal(4, 3, 5)}, ValueError, r"x, weight and down must have one width I, got \[5, 6, 6\]"),
        ({"x": normal(5, 3, 6)}, ValueError, "x must have a multiple of B = 2 rows, B of omega, got 5"),
        ({"weight": normal(7, 6).half()}, TypeError, "weight must be torch.float32 like x"),
        ({"weight": normal(7)}, ValueError, r"weight must be \[O, I\]"),
        ({"bias": normal(6)}, ValueError, r"bias must be \[7\] like the rows of weight, got \[6\]"),
        ({"up": normal(2, 3, 6)}, ValueError, r"up must be \[2, 3, 7\] to fit down and weight, got \[2, 3, 6\]"),
        ({"down": normal(2, 40, 6), "up": normal(2, 40, 7)}, ValueError, r"n \* r must be at most 64, got 2 \* 40"),
        ({"omega": normal(2, 3)}, ValueError, r"omega must be \[B, 2\] with the n of down, got \[2, 3\]"),
        ({"omega": normal(2, 2).double()}, TypeError, "omega must be torch.float32, got torch.float64"),
        ({"omega": normal(0, 2)}, ValueError, "x must have a multiple of B = 0 rows"),
    ],
)
def test_messages(change: dict, error: type[Exception], message: str) -> None:
    given = {"x": normal(4, 3, 6), "weight": normal(7, 6), "bias": normal(7), "down": normal(2, 3, 6),
             "up": normal(2, 3, 7), "omega": normal(2, 2)} | change  # fmt: skip
    with pytest.raises(error, match=message):
        mix_adapters(**given)


def test_messages_of_the_layer() -> None:
    with pytest.raises(ValueError, match=r"adapter 1 must be \[4, 24\] and \[36, 4\], got \[5, 24\] and \[36, 4\]"):
        LoraMix.from_linear(nn.Linear(24, 36), [(normal(4, 24), normal(36, 4)), (normal(5, 24), normal(36, 4))])
    with pytest.raises(ValueError, match=r"LoraMix: alpha \[B\] is for two adapters, got 3"):
        made(n=3)(normal(2, 5, 24), torch.rand(2))
    with pytest.raises(ValueError, match=r"omega must be \[3\], got \[2\]"):
        made(n=3).merge(torch.rand(2))
    with pytest.raises(ValueError, match="at least, got none"):
        LoraMix.from_linear(nn.Linear(2, 2), [])
