"""convolve_and_pool against PyTorch's layers in float64: random draws, special values, batches, messages."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.convolution import ConvolutionStem, convolve_and_pool, pack_kernel

from ..conftest import Check


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Drawn:
    """Random layers and an image that they take."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator
        channels, outputs, self.relu = self.draw(1, 10), self.draw(1, 50), self.draw(0, 2)
        size, stride = (self.draw(1, 8), self.draw(1, 8)), self.draw(1, 4)
        padding = self.draw(0, 5)
        self.layer = nn.Conv2d(channels, outputs, size, stride, padding, bias=bool(self.draw(0, 2)))
        self.pool = [lambda: None, self.largest, self.average][self.draw(0, 3)]()
        window = 1 if self.pool is None else self.pool.kernel_size - 2 * self.pool.padding
        least = [max((window - 1) * stride + taps - 2 * padding, 1) for taps in size]
        x = torch.randn(self.draw(1, 4), channels, *(n + self.draw(0, 40) for n in least), generator=generator)
        self.x = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)][
            self.draw(0, 3)
        ]

    def draw(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.generator))

    def window(self) -> tuple[int, int, int]:
        size = self.draw(1, 5)
        return size, self.draw(1, 5), self.draw(0, size // 2 + 1)

    def largest(self) -> Any:
        return nn.MaxPool2d(*self.window())

    def average(self) -> Any:
        return nn.AvgPool2d(*self.window(), count_include_pad=bool(self.draw(0, 2)))

    def ours(self, x: torch.Tensor) -> torch.Tensor:
        return ConvolutionStem.from_layers(self.layer, "relu" if self.relu else "none", self.pool)(x)

    def theirs(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer.to(x.dtype)(x)
        y = F.relu(y) if self.relu else y
        return y if self.pool is None else self.pool(y)


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
@torch.no_grad()
def test_random_layers(level: str) -> None:
    generator = torch.Generator().manual_seed(2)
    for i in range(50):
        drawn = Drawn(generator)
        with kernels.cpu_capability(level):
            got = drawn.ours(drawn.x)
        want = drawn.theirs(drawn.x.double())
        assert got.shape == want.shape
        assert got.is_contiguous(memory_format=torch.channels_last)
        assert (got - want).abs().max() <= 2e-6 * (1 + want.abs().max()), (i, drawn.layer, drawn.pool, drawn.x.shape)


def test_as_exact_as_pytorch() -> None:
    """Within twice the error of PyTorch's own convolution in float32."""
    x, weight, bias = normal(1, 3, 64, 65).relu(), normal(64, 3, 7, 7) * 0.1, normal(64)
    want = F.conv2d(x.double(), weight.double(), bias.double(), stride=2, padding=3)
    ours = convolve_and_pool(x, pack_kernel(weight), bias, stride=2, padding=3).double() - want
    theirs = F.conv2d(x, weight, bias, stride=2, padding=3).double() - want
    assert ours.norm() <= 2 * theirs.norm()


@pytest.mark.parametrize("level", kernels.cpu_capabilities())
@pytest.mark.parametrize("pool", [None, nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2, 2, 1)], ids=str)
@torch.no_grad()
def test_nan_and_infinity_reach_what_they_reach_in_pytorch(level: str, pool: Any) -> None:
    """Single numbers of the convolution made strange by an image that is zero elsewhere; every one of them in turn."""
    layer = nn.Conv2d(1, 20, 1, bias=True)
    stem = ConvolutionStem.from_layers(layer, "relu", pool)
    x = torch.zeros(49 * 3, 1, 7, 7)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf)):
        x[49 * i : 49 * (i + 1)].flatten(1).fill_diagonal_(value)
    want = F.relu(layer(x))
    want = want if pool is None else pool(want)
    with kernels.cpu_capability(level):
        torch.testing.assert_close(stem(x), want, equal_nan=True)


@pytest.mark.usefixtures("two_threads")
def test_an_image_alone_has_the_bits_it_has_in_a_batch() -> None:
    packed, bias = pack_kernel(normal(37, 3, 4, 4)), normal(37)

    def convolve(x: torch.Tensor) -> torch.Tensor:
        return convolve_and_pool(
            x, packed, bias, padding=2, activation="relu", pooling="max", pool_size=3, pool_stride=2
        )

    x = normal(5, 3, 77, 29)
    together = convolve(x)
    for i in range(5):
        assert torch.equal(convolve(x[i : i + 1]), together[i : i + 1])
    x[2] = torch.nan
    assert torch.equal(convolve(x)[[0, 1, 3, 4]], together[[0, 1, 3, 4]])


def test_a_state_dict_of_conv2d_loads() -> None:
    source = nn.Sequential(nn.Conv2d(3, 8, 4), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1, bias=False))
    first, last = ConvolutionStem(3, 8, 4, activation="relu"), ConvolutionStem(8, 5, 3, padding=1, bias=False)
    layers = nn.Sequential(first, nn.Identity(), last)
    assert not layers.load_state_dict(source.state_dict()).missing_keys
    x = normal(2, 3, 16, 15)
    torch.testing.assert_close(layers(x), source(x).detach(), rtol=1e-4, atol=1e-5)
    last.load_state_dict(ConvolutionStem(8, 5, 3, bias=False).state_dict())


def test_layers_that_are_none_of_these() -> None:
    for layer in (
        nn.Conv2d(4, 4, 3, stride=(2, 1)),
        nn.Conv2d(4, 4, 3, dilation=2),
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(4, 4, 3, padding=(1, 0)),
        nn.Conv2d(4, 4, 3, padding="same"),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
    ):
        with pytest.raises(ValueError, match=r"must have one stride and one padding for both sides"):
            ConvolutionStem.from_layers(layer)
    for pool in (
        nn.MaxPool2d(2, ceil_mode=True),
        nn.MaxPool2d(2, dilation=2),
        nn.MaxPool2d(2, return_indices=True),
        nn.AvgPool2d((2, 3)),
        nn.AvgPool2d(2, (1, 2)),
        nn.AvgPool2d(2, divisor_override=3),
    ):
        with pytest.raises(ValueError, match=r"the pooling must have square windows, and no dilation"):
            ConvolutionStem(3, 4, 3, pool=pool)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must not be negative"),
        ({"activation": "gelu"}, ValueError, "activation must be one of none, relu"),
        ({"pooling": "min"}, ValueError, "pooling must be one of none, max, average"),
        ({"pooling": "max", "pool_size": 0}, ValueError, "pool_size must be at least 1"),
        ({"pooling": "max", "pool_size": 2, "pool_stride": 0}, ValueError, "pool_stride must be at least 1"),
        ({"pooling": "max", "pool_size": 3, "pool_padding": 2}, ValueError, "from 0 to half of pool_size 3, got 2"),
        ({"pool_size": 2}, ValueError, r"without pooling .* got \(2, 2, 0\)"),
        ({"pooling": "max", "pool_size": 8}, ValueError, r"x must give a pixel at least, got \[2, 3, 9, 9\]"),
    ],
)
def test_messages_about_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        convolve_and_pool(normal(2, 3, 9, 9), pack_kernel(normal(5, 3, 3, 3)), torch.zeros(5), **settings)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, w, b: convolve_and_pool(x[0], w, b), ValueError, r"x must be \[B, C, H, W\]"),
        (lambda x, w, b: convolve_and_pool(x[:, :0], w[:, :0], b), ValueError, r"x must have a channel"),
        (lambda x, w, b: convolve_and_pool(x, w[:, :2], b), ValueError, r"must be \[P, 3, r, s, 16\]"),
        (lambda x, w, b: convolve_and_pool(x, w, torch.zeros(17)), ValueError, r"K channels of 1 panels"),
        (lambda x, w, b: convolve_and_pool(x, w.half(), b), TypeError, "packed must be float32"),
        (lambda x, w, b: convolve_and_pool(x, w, b.half()), TypeError, "bias must be float32"),
        (lambda x, w, b: convolve_and_pool(x.double(), w, b), TypeError, "x must be float32"),
        (lambda x, w, b: convolve_and_pool(x[:, :, :2], w, b), ValueError, "must give a pixel at least"),
        (lambda x, w, b: pack_kernel(normal(5, 3, 3)), ValueError, r"weight must be \[K, C, r, s\]"),
    ],
)
def test_messages(call: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 3, 9, 9), pack_kernel(normal(5, 3, 3, 3)), torch.zeros(5))


def test_avx512_over_emulated_registers(check_kernels: Check) -> None:
    check_kernels("convolution/stem_avx512", "-O0", "-fsanitize=address", emulated=True)
