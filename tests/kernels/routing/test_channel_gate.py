"""Channel gates against their definition, slow restatements and timm; folding, compile, export, errors."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.routing import (
    FieldGate,
    PairGate,
    SqueezeGate,
    StepGate,
    average_channels,
    fold_gate,
    gate_by_mean,
    gate_channels,
)
from planmill.kernels.routing.channel_gate.reference import (
    channel_gate_reference,
    channel_mean_reference,
    step_gate_reference,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 1, 1), (2, 197, 33), (1, 1, 1, 1), (3, 5, 7, 9), (2, 65, 16, 31), (0, 4, 3), (0, 5, 2, 2), (2, 3, 0))


def dtype_name(value: object) -> str:
    return str(value).removeprefix("torch.")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_functions_agree_with_the_definition(
    shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator
) -> None:
    atol, rtol = (1e-6, 1e-6) if dtype is torch.float32 else (1e-3, 8e-3)
    for x in (
        normal(generator, dtype, *shape),
        normal(generator, dtype, *shape, mean=100.0),
        normal(generator, dtype, *shape, scale=1e-4),
    ):
        channels = shape[1] if len(shape) == 4 else shape[2]
        mean, want = average_channels(x), channel_mean_reference(x)
        assert mean.dtype is torch.float32
        torch.testing.assert_close(mean.double(), want, atol=1e-6, rtol=1e-6)
        clear = want.abs() > 1e-5 * x.abs().amax() if x.numel() else want > math.inf
        assert torch.equal(gate_by_mean(x).double()[clear], step_gate_reference(x, 0.0)[clear])
        for gate in (torch.rand(channels, generator=generator), torch.rand(shape[0], channels, generator=generator)):
            got = gate_channels(x, gate, base=0.25, slope=1.5)
            assert got.dtype is dtype
            torch.testing.assert_close(got, channel_gate_reference(x, gate, 0.25, 1.5), atol=atol, rtol=rtol)


def test_strides_do_not_matter(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 2, 6, 8)
    gate = torch.rand(2, 8, generator=generator)
    torch.testing.assert_close(average_channels(strided(x)), average_channels(x))
    torch.testing.assert_close(gate_channels(strided(x), gate), gate_channels(x, gate))
    picture = normal(generator, torch.float32, 2, 8, 5, 3)
    last = picture.to(memory_format=torch.channels_last)
    torch.testing.assert_close(StepGate()(last), StepGate()(picture))
    torch.testing.assert_close(gate_channels(last, gate), gate_channels(picture, gate))


def test_a_long_mean_is_summed_in_float32() -> None:
    x = torch.full((1, 1, 300, 300), 1.0, dtype=torch.bfloat16)
    x[0, 0, 0, 0] = 0.5
    assert average_channels(x).item() == pytest.approx(1 - 0.5 / 90000, abs=1e-6)  # bfloat16 sums stop at 256
    assert average_channels(torch.full((1, 90000, 1), 60000.0, dtype=torch.float16)).item() == pytest.approx(60000)


def test_the_step_gate_is_that_of_dsat(generator: torch.Generator) -> None:
    """DSAT's public code (MIT), restated: positive mean doubles a channel, zero or negative mean keeps it."""
    x = normal(generator, torch.float32, 3, 6, 4, 5)
    x[0, 2] = 0.0
    x[1, 1, :, :] = torch.tensor([1.0, -1.0, 0.0, 0.5, -0.5])  # a mean of exactly 0
    y = StepGate()(x)
    for b in range(3):
        for c in range(6):
            raised = math.fsum(x[b, c].flatten().tolist()) > 0
            assert torch.equal(y[b, c], x[b, c] * 2 if raised else x[b, c])
    assert torch.equal(StepGate()(x.flatten(2).transpose(1, 2)), y.flatten(2).transpose(1, 2))
    assert torch.equal(StepGate(0.1, base=0.0)(x) != 0, (gate_by_mean(x, 0.1)[:, :, None, None] > 0) & (x != 0))


def test_nan_closes_its_own_gate_and_no_other(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 2, 3, 4, 4, mean=1.0)
    x[1, 2, 0, 0] = math.nan
    assert gate_by_mean(x).tolist() == [[1, 1, 1], [1, 1, 0]]
    y = StepGate()(x)
    assert int(y.isnan().sum()) == 1
    assert torch.equal(y[1, 2, 1:], x[1, 2, 1:])


def test_a_sample_does_not_depend_on_its_batch(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 4, 40, 24)
    assert torch.equal(StepGate()(x)[2:3], StepGate()(x[2:3]))


@pytest.mark.parametrize("dims", [3, 4])
def test_squeeze_gate_is_timm_s(dims: int, generator: torch.Generator) -> None:
    """timm's SEModule (Apache-2.0) with the same weights."""
    from timm.layers import SEModule

    module = SEModule(24, rd_channels=6)
    gate = SqueezeGate(24, 6)
    gate.load_state_dict(module.state_dict())
    x = normal(generator, torch.float32, 2, 24, 5, 7)
    want = module(x)
    got = gate(x) if dims == 4 else gate(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (5, 7))
    torch.testing.assert_close(got, want)
    again = SqueezeGate(24, 6)
    again.load_state_dict(gate.state_dict())
    assert torch.equal(again(x), gate(x))


def test_pair_gate(generator: torch.Generator) -> None:
    layer = PairGate(7, 12)
    z = normal(generator, torch.float32, 4, 12)
    a, b = torch.tensor([0, 3, 6, 2]), torch.tensor([1, 3, 0, 5])
    y = layer(z, a, b)
    assert torch.equal(layer(z, b, a), y)
    mean = (layer.embedding.weight[2] + layer.embedding.weight[5]) / 2
    hidden = torch.clamp_min(layer.fc1.weight @ mean + layer.fc1.bias, 0)
    want = z[3] / (1 + torch.exp(-(layer.fc2.weight @ hidden + layer.fc2.bias)))
    torch.testing.assert_close(y[3], want)
    head = nn.Linear(12, 5)
    folded = fold_gate(layer.gate(a[1], b[1]), head)
    torch.testing.assert_close(folded(z[1]), head(y[1]))


def test_field_gate(generator: torch.Generator) -> None:
    table, layer = nn.Embedding(9, 5), FieldGate(9)
    indices = torch.randint(9, (4, 3), generator=generator)
    e = table(indices)
    torch.testing.assert_close(layer.train()(e, indices), e)  # at the start, every gate is 1
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([0.5, -0.1, 0.0, 2.0, -3.0, 1e-3, 0.2, -0.2, 0.5]))
    kept = (layer.weight > 0)[indices][..., None]
    for scaled, s in ((True, 1 + math.exp(-0.5)), (False, 1.0)):
        layer.scaled = scaled
        y = layer.eval()(e, indices)
        torch.testing.assert_close(y, torch.where(kept, e * s, 0))
        torch.testing.assert_close(layer.fold(table)(indices), y)
    layer.scaled, layer.temperature = True, 1e6
    torch.testing.assert_close(layer.train().gate(indices)[indices != 2], layer.eval().gate(indices)[indices != 2])
    layer.temperature = 2.0
    layer.train()(e.detach(), indices).sum().backward()
    grad = layer.weight.grad
    assert grad is not None
    assert torch.equal(grad != 0, torch.bincount(indices.flatten(), minlength=9) > 0)


FOLLOWERS: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "linear": lambda: (nn.Linear(12, 5), (3, 7, 12)),
    "conv1d": lambda: (nn.Conv1d(12, 8, 3, padding=1), (3, 12, 9)),
    "conv2d_groups": lambda: (nn.Conv2d(12, 8, 3, stride=2, padding=1, groups=4), (3, 12, 9, 8)),
    "conv2d_depthwise": lambda: (nn.Conv2d(12, 24, 3, groups=12, bias=False, padding_mode="reflect"), (3, 12, 9, 8)),
    "conv3d": lambda: (nn.Conv3d(12, 4, 2), (2, 12, 4, 5, 3)),
    "transposed_groups": lambda: (nn.ConvTranspose2d(12, 6, 3, stride=2, groups=3), (3, 12, 4, 5)),
}


@pytest.mark.parametrize("name", FOLLOWERS)
def test_a_folded_gate_is_exact(name: str, generator: torch.Generator) -> None:
    torch.manual_seed(0)
    module, shape = FOLLOWERS[name]()
    x, gate = normal(generator, torch.float32, *shape).double(), torch.rand(12, generator=generator)
    gate[3] = 0.0
    before = {key: value.clone() for key, value in module.state_dict().items()}
    folded = fold_gate(gate, module.double(), base=1.0, slope=-0.5)
    factor = (1 - 0.5 * gate).double()
    want = module(x * (factor if name == "linear" else factor.view(-1, *[1] * (len(shape) - 2))))
    torch.testing.assert_close(folded(x), want, atol=1e-12, rtol=1e-12)
    assert all(torch.equal(value.float(), before[key]) for key, value in module.state_dict().items())


def test_gradients(generator: torch.Generator) -> None:
    x = normal(generator, torch.float32, 2, 5, 4).requires_grad_()
    gate = torch.rand(2, 4, generator=generator).requires_grad_()
    weight = normal(generator, torch.float32, 2, 5, 4)
    (gate_channels(x, gate, base=0.5, slope=2.0) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight * (0.5 + 2 * gate.detach())[:, None])
    torch.testing.assert_close(gate.grad, 2 * (weight * x.detach()).sum(1))
    x.grad = None
    (StepGate()(x) * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight * (1 + (x.detach().mean(1, keepdim=True) > 0).float()))


class Gates(nn.Module):
    """A step gate on pictures, then a squeeze gate on the tokens of the same."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.squeeze = StepGate(), SqueezeGate(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.squeeze(self.step(x).flatten(2).transpose(1, 2))


def test_compiles_and_exports_with_a_dynamic_batch(generator: torch.Generator) -> None:
    torch.compiler.reset()
    model, x = Gates().eval(), normal(generator, torch.float32, 3, 6, 4, 5)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(x), model(x))
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    other = normal(generator, torch.float32, 7, 6, 4, 5)
    torch.testing.assert_close(program.module()(other), model(other))


X, G = torch.zeros(2, 3, 4), torch.zeros(2, 4)
LINEAR = nn.Linear(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: average_channels(X[0]), ValueError, r"average_channels: x must be \[B, C, H, W\] or \[B, N, C\], got"),
        (lambda: gate_by_mean(X.int()), TypeError, "x must be float32, bfloat16 or float16, got torch.int32"),
        (lambda: gate_channels(X.double(), G), TypeError, "gate_channels: x must be float32"),
        (lambda: gate_channels(X, G.int()), TypeError, "gate must be float32, bfloat16 or float16"),
        (lambda: gate_channels(X, G[:1]), ValueError, r"gate must be \[2, 4\] or \[4\], got \[1, 4\]"),
        (lambda: gate_channels(X, G[:, :3]), ValueError, r"gate must be \[2, 4\] or \[4\], got \[2, 3\]"),
        (lambda: gate_channels(X, G.to("meta")), ValueError, "gate must be on cpu like x, got meta"),
        (
            lambda: fold_gate(G, LINEAR),
            ValueError,
            r"gate must be \[4\] like the module's input channels, got \[2, 4\]",
        ),
        (lambda: fold_gate(G[0].int(), LINEAR), TypeError, "gate must be float32"),
        (lambda: fold_gate(G[0], nn.LayerNorm(4)), TypeError, "nn.Linear or a convolution, got LayerNorm"),
        (lambda: FieldGate(5)(X, G.long()), ValueError, r"FieldGate: embeddings must be \[B, F, D\]"),
        (lambda: FieldGate(5).fold(nn.Embedding(4, 2)), ValueError, "embedding must have 5 rows, got 4"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
