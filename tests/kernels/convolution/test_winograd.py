"""convolve_with_winograd against nn.Conv2d in float64, random draws, and messages."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.convolution import WinogradConv2d, convolve_with_winograd, transform_weight
from planmill.kernels.convolution.winograd_convolution.transform import input_matrix, kernel_matrix, output_matrix

from ..conftest import Check


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_matrices_give_the_convolution_exactly(size: int) -> None:
    d, g = normal(6).double(), normal(size).double()
    found = output_matrix(size) @ ((kernel_matrix(size) @ g) * (input_matrix() @ d))
    torch.testing.assert_close(found, d.unfold(0, size, 1) @ g, rtol=1e-12, atol=1e-12)


def summed(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The convolution with padding 1, one product added after the other: every library sums in another order."""
    size, padded = weight.shape[2], F.pad(x, (1, 1, 1, 1))
    height, width = (n - size + 1 for n in padded.shape[2:])
    total = bias.view(-1, 1, 1).expand(len(x), -1, height, width).contiguous()
    for c, i, j in itertools.product(range(x.shape[1]), range(size), range(size)):
        total.addcmul_(weight[:, c, i, j].view(-1, 1, 1), padded[:, c : c + 1, i : i + height, j : j + width])
    return total


@pytest.mark.parametrize("size", [2, 3, 4, 5])
def test_as_exact_as_the_sum_over_taps(size: int) -> None:
    """About the error of the plain sum in float32."""
    x, weight = F.relu(normal(1, 192, 30, 31)), normal(64, 192, size, size) * 0.02
    bias = normal(64)
    want = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    ours = convolve_with_winograd(x, transform_weight(weight), bias, size=size, padding=1).double() - want
    plain = summed(x, weight, bias).double() - want
    assert ours.norm() <= 1.5 * plain.norm()
    assert ours.abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
def test_random_shapes(level: str) -> None:
    generator = torch.Generator().manual_seed(1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    for _ in range(60):
        size, padding = draw(2, 6), draw(0, 4)
        batch, channels, outputs = draw(1, 4), draw(1, 40), draw(1, 40)
        height, width = (max(draw(1, 24), size - 2 * padding) for _ in range(2))
        x = torch.randn(batch, channels, height, width, generator=generator)
        if draw(0, 2):
            x = x.contiguous(memory_format=torch.channels_last)
        layer = nn.Conv2d(channels, outputs, size, padding=padding, bias=bool(draw(0, 2)))
        with kernels.cpu_capability(level), torch.no_grad():
            got = WinogradConv2d.from_conv2d(layer)(x)
            want = layer.double()(x.double())
        assert got.shape == want.shape
        bound = 1e-5 * (1 + want.abs().max())
        assert (got - want).abs().max() <= bound, (size, padding, x.shape, outputs)


@pytest.mark.usefixtures("two_threads")
def test_an_image_alone_has_the_bits_it_has_in_a_batch() -> None:
    weight, bias = transform_weight(normal(37, 20, 3, 3)), normal(37)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        return convolve_with_winograd(x, weight, bias, size=3, padding=1)

    x = normal(5, 20, 33, 29)
    together = convolve(x)
    for i in range(5):
        assert torch.equal(convolve(x[i : i + 1]), together[i : i + 1])
    x[2] = torch.nan
    assert torch.equal(convolve(x)[[0, 1, 3, 4]], together[[0, 1, 3, 4]])


def test_threads_that_share_a_large_kernel_give_the_bits_of_one() -> None:
    layer, x = nn.Conv2d(64, 500, 3, padding=1), normal(1, 64, 11, 9)  # 9 tiles of 500 channels, in two parts
    threads, found = torch.get_num_threads(), []
    with torch.no_grad():
        for count in (1, 3):
            torch.set_num_threads(count)
            found.append(WinogradConv2d.from_conv2d(layer)(x))
        torch.set_num_threads(threads)
        want = layer.double()(x.double())
    assert torch.equal(*found)
    assert (found[0] - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_state_dict_of_conv2d_loads() -> None:
    source = nn.Sequential(nn.Conv2d(3, 8, 4), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1, bias=False))
    layers = nn.Sequential(WinogradConv2d(3, 8, 4), nn.ReLU(), WinogradConv2d(8, 5, 3, padding=1, bias=False))
    state = source.state_dict()
    assert not layers.load_state_dict(state).missing_keys
    assert set(state) == set(source.state_dict())
    x = normal(2, 3, 16, 15)
    torch.testing.assert_close(layers(x), source(x).detach(), rtol=1e-4, atol=1e-5)
    again = nn.Sequential(WinogradConv2d(3, 8, 4), nn.ReLU(), WinogradConv2d(8, 5, 3, padding=1, bias=False))
    again.load_state_dict(layers.state_dict())
    assert torch.equal(again(x), layers(x))


def test_convolutions_that_are_none_of_these() -> None:
    for layer in (
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, (3, 4)),
        nn.Conv2d(4, 4, 1),
        nn.Conv2d(4, 4, 6),
        nn.Conv2d(4, 4, 3, padding=(1, 0)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ):
        with pytest.raises(ValueError, match=r"must have a square kernel of 2 to 5 taps a side"):
            WinogradConv2d.from_conv2d(layer)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, u, b: convolve_with_winograd(x[0], u, b, size=3), ValueError, r"x must be \[B, C, H, W\]"),
        (lambda x, u, b: convolve_with_winograd(x, u, b, size=6), ValueError, "size must be from 2 to 5, got 6"),
        (
            lambda x, u, b: convolve_with_winograd(x, u, b, size=3, padding=-1),
            ValueError,
            "padding must not be negative",
        ),
        (lambda x, u, b: convolve_with_winograd(x, u[:, :, :2], b, size=3), ValueError, r"must be \[36, P, 3, 16\]"),
        (lambda x, u, b: convolve_with_winograd(x, u, torch.zeros(17), size=3), ValueError, r"channels of 1 panels"),
        (lambda x, u, b: convolve_with_winograd(x, u.half(), b, size=3), TypeError, "transformed must be float32"),
        (lambda x, u, b: convolve_with_winograd(x, u, b.half(), size=3), TypeError, "bias must be float32"),
        (lambda x, u, b: convolve_with_winograd(x.double(), u, b, size=3), TypeError, "x must be float32"),
        (lambda x, u, b: convolve_with_winograd(x[:, :, :2], u, b, size=3), ValueError, "must be 3 x 3 at least"),
        (lambda x, u, b: transform_weight(normal(5, 3, 3, 4)), ValueError, r"weight must be \[K, C, r, r\]"),
    ],
)
def test_messages(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 3, 9, 9), transform_weight(normal(5, 3, 3, 3)), torch.zeros(5))


def test_avx512_over_emulated_registers(check_kernels: Check) -> None:
    check_kernels("convolution/winograd_avx512", "-O0", "-fsanitize=address", emulated=True)
