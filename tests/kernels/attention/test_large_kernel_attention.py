"""LargeKernelAttention against VAN's modules, the op on random draws, and messages."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill import kernels
from planmill.kernels.attention import GatedLargeKernel, LargeKernelAttention, attend_with_large_kernel
from planmill.kernels.attention.large_kernel_attention.cases import compare, drawn


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class AttentionModule(nn.Module):
    """Convolutions named as in VAN (Apache-2.0); the chain of them is the oracle."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.conv_spatial = nn.Conv2d(dim, dim, 7, padding=9, groups=dim, dilation=3)
        self.conv1 = nn.Conv2d(dim, dim, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.conv1(self.conv_spatial(self.conv0(x)))


class SpatialAttention(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.proj_1, self.proj_2 = nn.Conv2d(dim, dim, 1), nn.Conv2d(dim, dim, 1)
        self.spatial_gating_unit = AttentionModule(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj_2(self.spatial_gating_unit(F.gelu(self.proj_1(x)))) + x


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("mine", "published"), [(LargeKernelAttention, AttentionModule), (GatedLargeKernel, SpatialAttention)]
)
def test_equals_van(mine: Any, published: Any, last: bool) -> None:
    """Oracle: the formulas of Visual-Attention-Network/VAN-Classification (Apache-2.0), restated, in float64."""
    theirs = published(6)
    layer = mine.from_van(theirs)
    x = normal(2, 6, 13, 18)
    if last:
        x, layer = x.contiguous(memory_format=torch.channels_last), layer.to(memory_format=torch.channels_last)
    want = theirs.double()(x.double())
    torch.testing.assert_close(layer(x).double(), want, atol=1e-5, rtol=1e-5)
    again = mine.from_van(theirs.float().state_dict())
    loaded = mine(6)
    loaded.load_state_dict(theirs.state_dict())
    assert torch.equal(again(x.contiguous()), loaded(x.contiguous()))


def test_each_convolution_has_its_own_border() -> None:
    """What the first gives outside of the image, its bias above all, must not reach the second."""
    x, *weights = drawn(torch.float32, torch.Generator().manual_seed(0), 1, 2, 6, 5)
    weights[1] += 100
    t = F.conv2d(F.pad(x, (11, 11, 11, 11)), weights[0], weights[1], padding=0, groups=2)
    assert t.shape[2:] == (24, 23)
    merged = x * F.conv2d(F.conv2d(t, weights[2], weights[3], dilation=3, groups=2), *weights[4:])
    got = attend_with_large_kernel(x, *weights)
    assert (merged - got).abs().max() > 1, "the test cannot tell the two apart"
    want = kernels.ops()["large_kernel_attention"].reference(x, *weights)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("shape", [(3, 5, 9, 10), (3, 100, 12, 12)], ids=["small", "groups"])
def test_a_sample_alone_has_the_bits_it_has_in_a_batch(shape: tuple[int, ...]) -> None:
    x, *weights = drawn(torch.float32, torch.Generator().manual_seed(0), *shape)
    together = attend_with_large_kernel(x, *weights)
    assert torch.equal(attend_with_large_kernel(x[1:2], *weights), together[1:2])
    x[0], x[2] = torch.nan, torch.inf
    assert torch.equal(attend_with_large_kernel(x, *weights)[1], together[1])


def test_gradient_and_one_graph() -> None:
    """Gradients of every parameter against VAN's chain, torch.compile(fullgraph=True), export of any image."""
    theirs = SpatialAttention(4)
    layer = GatedLargeKernel.from_van(theirs)
    x = normal(2, 4, 7, 9).requires_grad_()
    layer(x).square().sum().backward()
    z = x.detach().double().requires_grad_()
    theirs.double()(z).square().sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), z.grad, atol=1e-4, rtol=1e-4)
    published = dict(theirs.named_parameters())
    for name, mine in layer.named_parameters():
        assert mine.grad is not None
        torch.testing.assert_close(mine.grad.double(), published[name].grad, atol=1e-3, rtol=1e-3)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        height = torch.export.Dim("height", min=2, max=512)
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({2: height},))
        more = normal(2, 4, 33, 9, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.usefixtures("two_threads")
def test_random_images() -> None:
    """Random sizes, kinds of data and dtypes on every level against the definition."""
    spec = kernels.ops()["large_kernel_attention"]
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)

        def pick(*options: Any) -> Any:
            return options[int(torch.randint(len(options), (1,), generator=g))]  # noqa: B023

        sides = (1, 2, 3, 4, 6, 7, 8, 9, 12, 15, 16, 17, 24, 25, 31, 40, 56, 57)
        shape = (pick(1, 1, 3), pick(1, 2, 7, 49), pick(*sides), pick(*sides))
        dtype = pick(torch.float32, torch.float32, torch.bfloat16, torch.float16)
        args = drawn(dtype, g, *shape, scale=pick(0.01, 1, 1, 10), mean=pick(0, 0, 20))
        print(f"seed {seed}: {shape}, {dtype}")  # shown by pytest where it fails
        with kernels.cpu_capability(pick(*kernels.cpu_capabilities())):
            compare(args, (spec.op(*args),), (spec.reference(*args),), *spec.tolerances[dtype])


ARGS = drawn(torch.float32, torch.Generator().manual_seed(0), 2, 3, 5, 6)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, *w: attend_with_large_kernel(x[0], *w), ValueError, r"x must be \[B, C, H, W\], got \[3, 5, 6\]"),
        (lambda x, *w: attend_with_large_kernel(x.double(), *w), TypeError, "x must be float32.* got torch.float64"),
        (
            lambda x, *w: attend_with_large_kernel(x, w[2], *w[1:]),
            ValueError,
            r"weight5 must be \[3, 1, 5, 5\] for x \[2, 3, 5, 6\], got \[3, 1, 7, 7\]",
        ),
        (lambda x, *w: attend_with_large_kernel(x, *w[:5], w[5][:2]), ValueError, r"bias_point must be \[3\] for x"),
        (
            lambda x, *w: attend_with_large_kernel(x.half(), *w),
            TypeError,
            "weight5 must be torch.float16 like x, got torch.float32",
        ),
        (lambda x, *w: LargeKernelAttention.from_van({"a": x}), ValueError, "must hold conv0.weight, got a"),
        (lambda x, *w: GatedLargeKernel(4)(x), ValueError, r"GatedLargeKernel: x must be \[B, 4, H, W\], got \["),
        (lambda x, *w: GatedLargeKernel.from_van({}), ValueError, "must hold proj_1.weight, got none"),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(*ARGS)
