"""attend_in_subspaces against its definition, SubspaceAttention against ULSAM's chain."""

from typing import Any

import pytest
import torch
from torch import nn

from planmill.kernels.attention import SubspaceAttention, attend_in_subspaces
from planmill.kernels.attention.subspace_attention.reference import subspace_attention_reference


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vectors(channels: int, groups: int) -> tuple[torch.Tensor, ...]:
    return normal(channels), normal(channels, seed=1), normal(channels, seed=2), normal(groups, seed=3)


class Part(nn.Module):
    """A group of Nandan91/ULSAM (no licence file: restated from its description)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.conv_dws, self.bn_dws = nn.Conv2d(size, size, 1, groups=size), nn.BatchNorm2d(size)
        self.conv_point, self.bn_point = nn.Conv2d(size, 1, 1), nn.BatchNorm2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a = self.bn_dws(self.conv_dws(x)).relu()
        s = self.bn_point(self.conv_point(nn.functional.max_pool2d(a, 3, 1, 1))).relu()
        return x * s.flatten(2).softmax(2).view(s.shape) + x


class Published(nn.Module):
    """The chain over the groups, with random norms."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.subspaces = nn.ModuleList(Part(channels // groups) for _ in range(groups))
        for index, (name, value) in enumerate(self.state_dict().items()):
            if value.is_floating_point():
                drawn = normal(*value.shape, seed=index)
                value.copy_(drawn.abs() if "var" in name else drawn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = x.chunk(len(self.subspaces), 1)
        return torch.cat([group(part) for group, part in zip(self.subspaces, parts, strict=True)], 1)


@pytest.mark.parametrize("training", [False, True], ids=["folded", "training"])
@pytest.mark.parametrize(("channels", "groups"), [(8, 2), (6, 6), (5, 1)])
def test_equals_ulsam(channels: int, groups: int, training: bool) -> None:
    theirs = Published(channels, groups).train(training)
    mine = SubspaceAttention.from_ulsam(theirs).train(training)
    x = normal(3, channels, 7, 9)
    want = theirs.double()(x.double())
    torch.testing.assert_close(mine(x).double(), want, atol=1e-5, rtol=1e-5)
    assert set(mine.state_dict()) == set(theirs.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (2, 4, 3, 1), (2, 4, 17, 19), (0, 4, 3, 3)], ids=str)
def test_agrees_with_the_definition(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = normal(*shape).to(dtype)
    want = subspace_attention_reference(x, *vectors(4, 2))
    tolerance = 1e-5 if dtype is torch.float32 else 8e-3
    torch.testing.assert_close(attend_in_subspaces(x, *vectors(4, 2)), want, atol=1e-6, rtol=tolerance)
    last = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(attend_in_subspaces(last, *vectors(4, 2)), want, atol=1e-6, rtol=tolerance)


def test_an_image_without_positions_is_itself() -> None:
    x = normal(2, 4, 0, 3)
    assert torch.equal(SubspaceAttention(4, 2).eval()(x), x)


def test_a_peak_survives_16_bits() -> None:
    """1 + P is taken in float32: of 4096 positions, one that holds most of the weight is doubled."""
    x = torch.ones(1, 2, 64, 64, dtype=torch.bfloat16)
    x[..., 30, 30] = 20
    one, zero = torch.ones(2), torch.zeros(2)
    y = attend_in_subspaces(x, one, zero, one, torch.zeros(1))
    assert y[0, 0, 30, 30] > 21  # a ninth: the maximum reaches eight neighbours
    assert y[0, 0, 0, 0] == 1


def test_samples_gradient_and_one_graph() -> None:
    layer = SubspaceAttention.from_ulsam(Published(6, 3))
    theirs = Published(6, 3).eval()
    x = normal(2, 6, 5, 4).requires_grad_()
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
        torch.testing.assert_close(layer(x[1:]), layer(x)[1:], atol=1e-6, rtol=1e-6)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x))
        height = torch.export.Dim("height", min=2, max=512)
        program = torch.export.export(layer, (x.detach(),), dynamic_shapes=({2: height},))
        more = normal(2, 6, 33, 4, seed=3)
        torch.testing.assert_close(program.module()(more), layer(more))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x, *v: attend_in_subspaces(x[0], *v), ValueError, r"x must be \[B, C, H, W\], got \[4, 3, 5\]"),
        (lambda x, *v: attend_in_subspaces(x.double(), *v), TypeError, "x must be float32.* got torch.float64"),
        (lambda x, *v: attend_in_subspaces(x, v[3], *v[1:]), ValueError, r"alpha must be \[4\] for x .* got \[2\]"),
        (lambda x, *v: attend_in_subspaces(x, *v[:3], v[3][:0]), ValueError, r"delta must be \[g\], g dividing the 4"),
        (lambda x, *v: SubspaceAttention(6, 4), ValueError, "groups must divide the 6 channels, got 4"),
        (lambda x, *v: SubspaceAttention(6, 2)(x), ValueError, r"x must be \[B, 6, H, W\], got \[2, 4, 3, 5\]"),
        (
            lambda x, *v: SubspaceAttention.from_ulsam({"a": x}),
            ValueError,
            "must hold subspaces.0.conv_dws.bias, got a",
        ),
    ],
)
def test_messages(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(normal(2, 4, 3, 5), *vectors(4, 2))
