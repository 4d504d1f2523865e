"""apply_packed_weight against nn.Linear in float64, random draws, rows alone and in a batch, and messages."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.linear import PackedLinear, apply_packed_weight, pack_weight
from planmill.kernels.linear.packed_linear.reference import ACTIVATIONS

from ..conftest import Check


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_as_exact_as_a_product_in_blocks() -> None:
    """Within twice the error of PyTorch's own product, however many channels there are."""
    for channels in (96, 1536, 5000):
        x, weight = normal(50, channels), normal(70, channels, seed=1) / channels**0.5
        want = x.double() @ weight.double().T
        ours = apply_packed_weight(x, pack_weight(weight), torch.zeros(70)).double() - want
        assert ours.norm() <= 2 * (F.linear(x, weight).double() - want).norm()


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_random_shapes(level: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(60):
        channels, outputs = draw(1, 700), draw(1, 100)
        lead = [draw(1, 30) for _ in range(draw(0, 3))]
        x = torch.randn(*lead, channels, generator=generator)
        if lead and draw(0, 2):
            x = x.transpose(0, -1).contiguous().transpose(0, -1)
        layer = nn.Linear(channels, outputs, bias=bool(draw(0, 2)))
        activation = list(ACTIVATIONS)[draw(0, len(ACTIVATIONS))]
        with kernels.cpu_capability(level), torch.no_grad():
            got = PackedLinear.from_linear(layer, activation)(x)
            want = ACTIVATIONS[activation](layer.double()(x.double()))
        assert got.shape == want.shape
        assert (got - want).abs().max() <= 2e-6 * (1 + want.abs().max()), (lead, channels, outputs, activation)


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
@pytest.mark.usefixtures("two_threads")
def test_a_row_alone_has_the_bits_it_has_in_a_batch(level: str) -> None:
    packed, bias, x = pack_weight(normal(401, 300)), normal(401), normal(500, 300)
    with kernels.cpu_capability(level):
        together = apply_packed_weight(x, packed, bias, activation="gelu")
        for first, rows in ((0, 1), (3, 2), (11, 7), (100, 13), (200, 241)):
            alone = apply_packed_weight(x[first : first + rows], packed, bias, activation="gelu")
            assert torch.equal(alone, together[first : first + rows]), rows


def test_a_state_dict_of_linear_loads() -> None:
    source = nn.Sequential(nn.Linear(3, 40), nn.ReLU(), nn.Linear(40, 5, bias=False))
    layers = nn.Sequential(PackedLinear(3, 40, activation="relu"), nn.Identity(), PackedLinear(40, 5, bias=False))
    state = source.state_dict()
    assert not layers.load_state_dict(state).missing_keys
    assert set(state) == set(source.state_dict())
    x = normal(2, 7, 3)
    torch.testing.assert_close(layers(x), source(x).detach(), rtol=1e-5, atol=1e-6)
    again = nn.Sequential(PackedLinear(3, 40, activation="relu"), nn.Identity(), PackedLinear(40, 5, bias=False))
    again.load_state_dict(layers.state_dict())
    assert torch.equal(again(x), layers(x))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, p, b: apply_packed_weight(x[0, 0], p, b), ValueError, r"x must be \[..., K\], got a scalar"),
        (
            lambda x, p, b: apply_packed_weight(x[:, :2], p, b),
            ValueError,
            r"packed must be \[P, 2, 16\] for x",
        ),
        (lambda x, p, b: apply_packed_weight(x, p[0], b), ValueError, r"packed must be \[P, 3, 16\]"),
        (lambda x, p, b: apply_packed_weight(x, p, torch.zeros(17)), ValueError, r"channels of 1 panels of 16"),
        (lambda x, p, b: apply_packed_weight(x, p, b[None]), ValueError, r"bias must be \[N\]"),
        (lambda x, p, b: apply_packed_weight(x, p, b, activation="tanh"), ValueError, "activation must be one of none"),
        (lambda x, p, b: apply_packed_weight(x.half(), p, b), TypeError, "x must be float32, got torch.float16"),
        (lambda x, p, b: apply_packed_weight(x, p.double(), b), TypeError, "packed must be float32, got torch.float64"),
        (
            lambda x, p, b: apply_packed_weight(x, p, b.bfloat16()),
            TypeError,
            "bias must be float32, got torch.bfloat16",
        ),
        (lambda x, p, b: apply_packed_weight(x, p.to("meta"), b), ValueError, "packed must be on cpu like x, got meta"),
        (lambda x, p, b: pack_weight(x[0]), ValueError, r"weight must be \[N, K\], got \[3\]"),
        (lambda x, p, b: pack_weight(x.half()), TypeError, "weight must be float32, got torch.float16"),
    ],
)
def test_messages(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(4, 3), pack_weight(normal(5, 3)), torch.zeros(5))


def test_avx512_over_emulated_registers(check_kernels: Check) -> None:
    check_kernels("linear/packed_linear_avx512", "-O0", "-fsanitize=address", emulated=True)
