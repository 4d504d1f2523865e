"""16-bit programs: what runs in float32 on which processor, where results are rounded, and how inputs lie."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine import DynamicDim, capture
from planmill.engine.capture import Captured
from planmill.engine.manifest import Precision
from planmill.engine.rewrites import default_passes, halves, rewrite

from .test_rewrites_random import check

SMALL = DynamicDim("batch", 1, 3, 4)
OPS = ("stem_convolution", "winograd_convolution", "packed_linear", "softmax_attention")
LATE = ("float32_arithmetic", "late_rounding")
BUILT = default_passes("aoti", "cpu")


@dataclass
class Machine:
    """Instruction sets as the kernel names them."""

    isa: list[str]


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Call it with what the processor shall have; what computes stays this one."""
    return lambda *flags: monkeypatch.setattr(halves, "this_machine", lambda: Machine(["avx2", *flags]))


class Network(nn.Module):
    """A normalised image, a first layer that pools, two that Winograd's algorithm takes, attention, a linear layer."""

    mean: torch.Tensor

    def __init__(self, outputs: int = 256) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.second, self.head = nn.Conv2d(32, 32, 3), nn.Linear(32, outputs)
        self.register_buffer("mean", torch.rand(3, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x - self.mean)), 2)
        x = self.second(F.avg_pool2d(F.leaky_relu(self.first(x)), 3, 1)).flatten(2).mT[:, None]
        return self.head(F.scaled_dot_product_attention(x, x, x))[:, 0]


def network(outputs: int = 256) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return Network(outputs).eval(), 3 + torch.rand(3, 3, 34, 34)


@pytest.mark.parametrize(
    ("precision", "flags", "fired"),
    [
        ("bf16", (), OPS),
        ("bf16", ("avx512_bf16",), (OPS[0], OPS[1], OPS[3])),
        ("bf16", ("avx512_bf16", "amx_bf16"), ()),
        ("fp16", ("avx512_bf16", "amx_bf16"), OPS),
        ("fp16", ("avx512_fp16",), (OPS[0], OPS[1], OPS[3])),
        ("fp16", ("avx512_fp16", "amx_fp16"), ()),
        ("fp32", ("avx512_bf16", "amx_bf16"), OPS),
    ],
)
@torch.no_grad()
def test_what_runs_in_float32(
    precision: Precision, flags: tuple[str, ...], fired: tuple[str, ...], processor: Callable[..., None]
) -> None:
    processor(*flags)
    model, x = network()
    rewritten = rewrite(capture(model, x, dynamic=SMALL, precision=precision), BUILT)
    assert [name for name in rewritten.rewrites if name in OPS] == list(fired)
    (got,), want = rewritten.program.module()(x), model.double()(x.double())
    error = (got - want).abs().max() / want.abs().max()
    if fired == OPS:  # with nothing in 16 bits left, nothing is rounded to them
        assert dtypes_in(rewritten) == {torch.float32}
        assert error <= 1e-6
    else:
        assert dtypes_in(rewritten) & {torch.bfloat16, torch.float16}
        assert error <= 1e-2


def dtypes_in(captured: Captured) -> set[torch.dtype]:
    """Of all that a program computes."""
    values = [node.meta.get("val") for node in captured.program.graph.nodes if node.op == "call_function"]
    return {value.dtype for value in values if isinstance(value, torch.Tensor)}


@torch.no_grad()
def test_what_little_is_left_runs_in_float32(processor: Callable[..., None]) -> None:
    model, x = network(outputs=5)
    captured = capture(model, x, dynamic=SMALL, precision="bf16")
    processor("avx512_bf16", "amx_bf16")
    assert rewrite(captured, BUILT) is captured
    processor("avx512_bf16")
    rewritten = rewrite(captured, BUILT)
    assert rewritten.rewrites == [*("stem_convolution", "winograd_convolution", "softmax_attention"), *LATE]
    assert dtypes_in(rewritten) == {torch.float32}
    (got,), want = rewritten.program.module()(x), model.double()(x.double())
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


class Products(nn.Module):
    """Products that are no layers, between norms, in pieces and behind a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(12), nn.Linear(12, 36, bias=False)
        self.conv = nn.Conv1d(12, 12, 3, stride=2)
        self.register_buffer("later", torch.ones(9, 9).triu(1) > 0)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v = self.layer(self.norm(x)).view(*x.shape[:2], 3, 12).unbind(2)
        scores = (q @ k.mT).masked_fill(self.later, -1.0).softmax(-1)
        first, second = torch.bmm(scores, v).chunk(2, -1)
        return torch.cat([first.relu(), second], -1), self.conv(x.mT)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@torch.no_grad()
def test_without_units_nothing_is_multiplied_in_16_bits(precision: Precision, processor: Callable[..., None]) -> None:
    torch.manual_seed(3)
    model, x = Products().eval(), torch.rand(3, 9, 12)
    captured = capture(model, x, dynamic=SMALL, precision=precision)
    processor("avx512_bf16", "avx512_fp16")
    assert rewrite(captured, BUILT) is captured
    processor()
    rewritten = rewrite(captured, BUILT)
    assert rewritten.rewrites == ["packed_linear", *LATE]
    assert dtypes_in(rewritten) == {torch.float32}
    wanted = model.double()(x.double())
    for got, want in zip(rewritten.program.module()(x), wanted, strict=True):
        assert (got - want).abs().max() <= 2e-6 * want.abs().max()


class Mixed(nn.Module):
    """A convolution of ours whose result a 16-bit one reads too, and what both make of it."""

    def __init__(self) -> None:
        super().__init__()
        self.ours, self.again = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 3, padding=1)
        self.theirs = nn.Conv2d(32, 32, (3, 1), padding=(1, 0))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = F.relu(self.ours(x))
        z = self.theirs(y)
        return z + y, self.again(y), self.again(z), 2 * y


@torch.no_grad()
def test_16_bit_steps_read_rounded_numbers(processor: Callable[..., None]) -> None:
    processor("avx512_bf16")
    torch.manual_seed(1)
    model, x = Mixed().eval(), torch.randn(3, 32, 16, 16)
    rewritten = rewrite(capture(model, x, dynamic=SMALL, precision="bf16"), BUILT)
    assert rewritten.rewrites == ["winograd_convolution", "late_rounding"]
    got = rewritten.program.module()(x)
    assert {y.dtype for y in got} == {torch.float32}
    y = F.relu(model.ours(x))  # the image is rounded for nobody
    for index, want in ((1, model.again(y)), (3, 2 * y)):
        torch.testing.assert_close(got[index], want, rtol=1e-5, atol=1e-5)
    z = model.theirs(y)
    for index, want in ((0, z + y), (2, model.again(z))):
        error = (got[index] - want).abs().max() / want.abs().max()
        assert 1e-5 < error < 2e-2


class Rounds(nn.Module):
    """What rounds to 16 bits of its own accord."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x).bfloat16().relu().float()


@torch.no_grad()
def test_the_rounding_of_a_model_stays(processor: Callable[..., None]) -> None:
    processor()
    torch.manual_seed(2)
    model, x = Rounds().eval(), torch.randn(3, 32, 16, 16)
    rewritten = rewrite(capture(model, x, dynamic=SMALL), BUILT)
    assert rewritten.rewrites == ["winograd_convolution"]
    (got,) = rewritten.program.module()(x)
    assert got.equal(got.bfloat16().float())


class Doubling(nn.Module):
    """Each of many steps reads the last one twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer(x)
        for _ in range(40):
            x = x.relu() - 0.5 * x
        return self.layer(x)


def test_many_ways_are_gone_once(processor: Callable[..., None]) -> None:
    processor()
    captured = capture(Doubling().eval(), torch.randn(3, 32, 16, 16), dynamic=SMALL, precision="bf16")
    rewritten = rewrite(captured, BUILT)
    assert rewritten.rewrites == ["winograd_convolution", "late_rounding"]
    steps = [node for node in rewritten.program.graph.nodes if node.target is torch.ops.aten.relu.default]
    assert len(steps) == 40
    assert {node.meta["val"].dtype for node in steps} == {torch.float32}


class Turned(nn.Module):
    """Linear layers on pictures whose channels are last by strides, by memory, and on rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        a, b, c, d = self.layers
        turned = x.permute(0, 2, 3, 1)
        return a(turned), b(x.transpose(1, 3).flatten(1, 2)), c(turned.contiguous()), d(x[:, 0, :, :6])


@pytest.mark.parametrize("passes", [["contiguous_input"], ["packed_linear", "contiguous_input"]], ids=len)
@torch.no_grad()
def test_what_linear_layers_read_is_contiguous(passes: list[str]) -> None:
    model, x = Turned().eval(), torch.rand(3, 6, 7, 8)
    rewritten = rewrite(capture(model, x, dynamic=SMALL), passes)
    assert rewritten.rewrites == passes
    linear = torch.ops.planmill.packed_linear.default if len(passes) == 2 else torch.ops.aten.linear.default
    layers = [node for node in rewritten.program.graph.nodes if node.target is linear]
    assert len(layers) == 4
    assert all(node.args[0].meta["val"].is_contiguous() for node in layers)
    for got, want in zip(rewritten.program.module()(x), model(x), strict=True):
        torch.testing.assert_close(got, want)
    captured = capture(nn.Linear(6, 4).eval(), torch.rand(3, 6), dynamic=SMALL)
    assert rewrite(captured, ["contiguous_input"]) is captured


@torch.no_grad()
@pytest.mark.parametrize("flags", [(), ("avx512_bf16",), ("avx512_bf16", "amx_bf16")], ids=len)
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_random_programs(precision: Precision, flags: tuple[str, ...], processor: Callable[..., None]) -> None:
    processor(*flags)
    for seed in range(4):
        check(seed, wide=True, precision=precision)


@torch.no_grad()
def test_folded_weights_are_not_rounded(processor: Callable[..., None]) -> None:
    processor("avx512_bf16")
    torch.manual_seed(4)
    norm = nn.BatchNorm2d(96)
    norm.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    model, x = nn.Sequential(nn.Conv2d(96, 96, 3), norm).eval(), torch.randn(3, 96, 16, 16)
    rewritten = rewrite(capture(model, x, dynamic=SMALL, precision="bf16"), BUILT)
    assert rewritten.rewrites == ["affine_into_output", "winograd_convolution", "late_rounding"]
    (got,), want = rewritten.program.module()(x), model.double()(x.double())
    assert (got - want).abs().max() <= 3e-6 * want.abs().max()
