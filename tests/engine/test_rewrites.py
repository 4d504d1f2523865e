"""Rewrites of captured programs: each fires where its equation holds and computes the same; look-alikes stay."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine import DynamicDim, PlanError, Session, build, capture
from planmill.engine.rewrites import DEFAULT, PASSES, default_passes, rewrite

SMALL = DynamicDim("batch", 1, 3, 4)
# these have tests of their own
ABSENT = {
    "winograd_convolution",
    "softmax_attention",
    "float32_arithmetic",
    "late_rounding",
}  # in a small float32 network
FOR_CPUS = PASSES[PASSES.index("stem_convolution") :]
FOLDS = [name for name in PASSES if name not in FOR_CPUS]
MEAN, STD = torch.tensor([0.5, 0.45, 0.4]).view(3, 1, 1), torch.tensor([0.23, 0.22, 0.24]).view(3, 1, 1)


class Model(nn.Module):
    """A function of the input, its layers and its constants."""

    def __init__(self, function: Callable[..., Any], **layers: nn.Module | torch.Tensor) -> None:
        super().__init__()
        self.function: Any = function
        for name, layer in layers.items():
            if isinstance(layer, nn.Module):
                self.add_module(name, layer)
            else:
                self.register_buffer(name, layer)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and module.track_running_stats:
                nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
                nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
                for parameter in module.parameters():
                    nn.init.uniform_(parameter, -2, 2)
        self.eval()

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def up(x: torch.Tensor, size: tuple[int, int] = (12, 12), mode: str = "bilinear") -> torch.Tensor:
    """A picture resized."""
    return F.interpolate(x, size=size, mode=mode)


def normalized(x: torch.Tensor) -> torch.Tensor:
    """Images by mean and deviation, as transforms do."""
    return (x - MEAN.to(x.dtype)) / STD.to(x.dtype)


IMAGE, TOKENS = (3, 12, 12), (6, 8)


def of_images(
    function: Callable[..., Any], shape: tuple[int, ...] = IMAGE, **layers: Any
) -> tuple[Model, torch.Tensor]:
    """A model and its input."""
    torch.manual_seed(0)
    return Model(function, **layers), torch.rand(3, *shape)


def conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    """A convolution with random weights; `torch.manual_seed` does not matter here."""
    return nn.Conv2d(*args, **kwargs)


FIRES = {
    "normalized-images": (
        ["normalization_into_input"],
        lambda: of_images(lambda m, x: m.c(normalized(x)), c=conv(3, 5, 4, stride=2, bias=False)),
    ),
    "normalized-groups-dilation": (
        ["normalization_into_input"],
        lambda: of_images(lambda m, x: m.c(2 - normalized(x)), c=conv(3, 6, 3, groups=3, dilation=2)),
    ),
    "normalized-for-two": (
        ["normalization_into_input", "shared_convolution"],
        lambda: of_images(
            lambda m, x: (lambda y: m.a(y).relu() + m.b(y).relu())(normalized(x)), a=conv(3, 4, 3), b=conv(3, 4, 3)
        ),
    ),
    "bytes": (
        ["normalization_into_input"],
        lambda: of_images(lambda m, x: m.c((x * 255 - 120.0) / 60.0), c=conv(3, 4, 3)),
    ),
    "scaled-and-padded": (
        ["normalization_into_input"],
        lambda: of_images(lambda m, x: m.c(x / STD), c=conv(3, 4, 3, padding=1)),
    ),
    "normalized-and-padded": (
        ["normalization_into_input", "normalization_into_padding"],
        lambda: of_images(
            lambda m, x: m.c(normalized(x)), c=conv(3, 6, (3, 4), stride=2, padding=(1, 2), groups=3, bias=False)
        ),
    ),
    "one-mean-and-padded": (
        ["normalization_into_padding"],
        lambda: of_images(
            lambda m, x: (lambda y: (m.a(y), m.b(y)))(1 - 2 * x),
            a=conv(3, 4, 3, padding=1, dilation=2),
            b=conv(3, 2, 5, padding=1),
        ),
    ),
    "signals-normalized-and-padded": (
        ["normalization_into_padding"],
        lambda: of_images(lambda m, x: m.c(m.s - x), (3, 20), c=nn.Conv1d(3, 4, 3, padding=2), s=torch.rand(3, 1)),
    ),
    "normalized-rows": (
        ["normalization_into_input"],
        lambda: of_images(lambda m, x: m.l(x * m.s + m.h), TOKENS, l=nn.Linear(8, 4), s=torch.rand(8), h=torch.rand(8)),
    ),
    "batch-norm-relu-in-place": (
        ["affine_into_output"],
        lambda: of_images(
            lambda m, x: m.s(x), s=nn.Sequential(conv(3, 5, 3, padding=1), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
        ),
    ),
    "batch-norm-1d-and-3d": (
        ["affine_into_output"],
        lambda: of_images(
            lambda m, x: (m.n(m.c(x.flatten(2))), m.o(m.d(x[:, :, None]))),
            c=nn.Conv1d(3, 4, 3, bias=False),
            n=nn.BatchNorm1d(4, affine=False),
            d=nn.Conv3d(3, 4, (1, 3, 3), groups=1),
            o=nn.BatchNorm3d(4),
        ),
    ),
    "teacher-statistics": (
        ["affine_into_output"],
        lambda: of_images(
            lambda m, x: (m.c(x) - m.mean) / torch.where(m.std.sum() != 0, m.std, 1.0),
            c=conv(3, 5, 3),
            mean=torch.rand(1, 5, 1, 1),
            std=torch.rand(1, 5, 1, 1) + 0.5,
        ),
    ),
    "linear-linear-norm": (
        ["affine_into_output", "linear_into_linear"],
        lambda: of_images(
            lambda m, x: F.leaky_relu(m.n(m.b(m.a(x.flatten(0, 1)))), 0.2),
            TOKENS,
            a=nn.Linear(8, 8),
            b=nn.Linear(8, 5, bias=False),
            n=nn.BatchNorm1d(5),
        ),
    ),
    "two-maps": (
        ["one_upsample"],
        lambda: of_images(
            lambda m, x: (
                0.5 * ((up(F.pad(x[:, :1], (2, 2, 2, 2)), (20, 20)) - m.q) * 3)
                + (up(F.pad(x[:, 1:2] ** 2, (2, 2, 2, 2)), (20, 20)) - 0.7) / m.q
            ),
            q=torch.tensor(0.3),
        ),
    ),
    "three-maps-bicubic": (
        ["one_upsample"],
        lambda: of_images(
            lambda m, x: (
                (2 * up(x, (25, 13), "bicubic") + 1)
                + up(x**2, (25, 13), "bicubic") * STD
                + up(x**3, (25, 13), "bicubic")
            )
        ),
    ),
    "pointwise-after-resize": (
        ["upsample_last"],
        lambda: of_images(lambda m, x: m.c(up(x, (24, 24), "nearest")), (8, 12, 12), c=conv(8, 4, 1)),
    ),
    "view-behind-it": (
        ["upsample_last"],
        lambda: of_images(lambda m, x: m.c(up(x, (24, 24))).view(x.shape[0], -1), (8, 12, 12), c=conv(8, 4, 1)),
    ),
    "rows-of-two-layers": (
        ["upsample_last"],
        lambda: of_images(
            lambda m, x: m.l(
                torch.cat([x, up(x[:, :, ::2, ::2] ** 2), up(x[:, :, :3, :4])], 1).permute(0, 2, 3, 1).reshape(-1, 24)
            ),
            (8, 12, 12),
            l=nn.Linear(24, 7),
        ),
    ),
    "tokens-of-a-layer": (
        ["upsample_last"],
        lambda: of_images(
            lambda m, x: m.l(up(x[:, :, ::2, ::3]).flatten(2).transpose(1, 2)),
            (8, 12, 12),
            l=nn.Linear(8, 7, bias=False),
        ),
    ),
    "three-first-convolutions": (
        ["shared_convolution"],
        lambda: of_images(
            lambda m, x: (F.avg_pool2d(m.a(x).relu(), 2), F.avg_pool2d(m.b(x).relu(), 2), m.c(x).relu().amax((2, 3))),
            a=conv(3, 4, 3, padding=1),
            b=conv(3, 6, 3, padding=1, bias=False),
            c=conv(3, 2, 3, padding=1),
        ),
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("name", FIRES)
def test_fires_and_computes_the_same(name: str) -> None:
    names, make = FIRES[name]
    model, x = make()
    captured = capture(model, x, dynamic=SMALL)
    rewritten = rewrite(captured, FOLDS)
    assert sorted(rewritten.rewrites) == sorted(names)
    run = rewritten.program.module()
    for sample in (torch.rand_like(x), torch.randn_like(x)[:1] * 3):
        exact = capture_exact(model, sample)
        plain = captured.program.module()(sample)
        for got, wanted, before in zip(run(sample), exact, plain, strict=True):
            assert got.shape == wanted.shape
            assert got.dtype == before.dtype
            scale = wanted.abs().max()
            assert (got - wanted).abs().max() <= 4 * (before - wanted).abs().max() + 4e-7 * scale


def capture_exact(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The model's outputs in float64."""
    found = copy.deepcopy(model).double()(x.double())
    return list(found) if isinstance(found, tuple) else [found]


def twice(layer: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A layer's result, seen by an affine step and by someone else."""
    y = layer(x)
    return y * 2 + 1, y


ALONE = {
    "zeros-around-two-ways": lambda: of_images(
        lambda m, x: (lambda y: (m.a(y), m.b(y)))(normalized(x) - 1), a=conv(3, 4, 3, padding=1), b=conv(3, 4, 3)
    ),
    "other-zeros-around": lambda: of_images(
        lambda m, x: (lambda y: (m.a(y), m.b(y)))(x - MEAN), a=conv(3, 4, 3, padding=1), b=conv(3, 4, 5, padding=2)
    ),
    "a-shift-that-no-pixel-undoes": lambda: of_images(
        lambda m, x: m.c(x * m.s + 1), c=conv(3, 4, 3, padding=1), s=torch.tensor([0.0, 1.0, 1.0]).view(3, 1, 1)
    ),
    "features-shifted-and-padded": lambda: of_images(
        lambda m, x: m.c(x - m.h), (17, 12, 12), c=conv(17, 4, 3, padding=1), h=torch.rand(17, 1, 1)
    ),
    "edges-around-a-normalized-image": lambda: of_images(
        lambda m, x: m.c(x - MEAN), c=conv(3, 4, 3, padding=1, padding_mode="replicate")
    ),
    "normalized-image-seen-elsewhere": lambda: of_images(
        lambda m, x: (lambda y: (m.c(y), y.amax((2, 3))))(normalized(x)), c=conv(3, 4, 3)
    ),
    "subtraction-that-saves-digits": lambda: of_images(lambda m, x: m.c(x - 900.0), c=conv(3, 4, 3)),
    "a-mean-for-every-pixel": lambda: of_images(lambda m, x: m.c(x - m.mean), c=conv(3, 4, 3), mean=torch.rand(12, 12)),
    "a-mean-that-enlarges": lambda: of_images(
        lambda m, x: m.c(x[:, :1] - m.mean), c=conv(3, 4, 3), mean=torch.rand(3, 1, 1)
    ),
    "a-mean-that-is-an-input": lambda: of_images(lambda m, x: m.c(x - x[:, :, :1, :1]), c=conv(3, 4, 3)),
    "transposed-convolution": lambda: of_images(lambda m, x: m.c(normalized(x)), c=nn.ConvTranspose2d(3, 4, 3)),
    "a-result-with-two-users": lambda: of_images(lambda m, x: twice(m.c, x), c=conv(3, 4, 3)),
    "norm-by-the-batch": lambda: of_images(
        lambda m, x: m.n(m.c(x)), c=conv(3, 4, 3), n=nn.BatchNorm2d(4, track_running_stats=False)
    ),
    "norm-of-tokens-not-channels": lambda: of_images(
        lambda m, x: m.n(m.l(x)), (7, 8), l=nn.Linear(8, 7), n=nn.BatchNorm1d(7)
    ),
    "a-scale-for-every-pixel": lambda: of_images(lambda m, x: m.c(x) * m.s, c=conv(3, 4, 3), s=torch.rand(10, 10)),
    "a-division-by-the-result": lambda: of_images(lambda m, x: 2 / (m.c(x) ** 2 + 1), c=conv(3, 4, 3)),
    "a-zero-deviation": lambda: of_images(
        lambda m, x: (m.c(x) / m.std).clamp(-9, 9), c=conv(3, 2, 3), std=torch.tensor([0.0, 1.0]).view(2, 1, 1)
    ),
    "a-narrow-middle": lambda: of_images(lambda m, x: m.b(m.a(x)), TOKENS, a=nn.Linear(8, 1), b=nn.Linear(1, 8)),
    "a-relu-between": lambda: of_images(lambda m, x: m.b(m.a(x).relu()), TOKENS, a=nn.Linear(8, 8), b=nn.Linear(8, 8)),
    "a-middle-seen-elsewhere": lambda: of_images(
        lambda m, x: (lambda y: (m.b(y), y.relu()))(m.a(x)), TOKENS, a=nn.Linear(8, 8), b=nn.Linear(8, 8)
    ),
    "maps-of-two-modes": lambda: of_images(lambda m, x: up(x, (24, 24)) + up(x**2, (24, 24), "nearest")),
    "maps-of-two-sizes": lambda: of_images(lambda m, x: up(x, (24, 24)) + up(x[:, :, ::2, ::2], (24, 24))),
    "a-relu-after-resizing": lambda: of_images(
        lambda m, x: (up(x, (24, 24)) - 0.5).relu() + (up(x**2, (24, 24)) - 0.5).relu()
    ),
    "a-pixel-weight-after-resizing": lambda: of_images(
        lambda m, x: up(x, (24, 24)) * m.w + up(x**2, (24, 24)), w=torch.rand(24, 24)
    ),
    "maps-that-shrink": lambda: of_images(lambda m, x: up(x, (5, 5)) + up(x**2, (5, 5))),
    "a-resized-map-seen-elsewhere": lambda: of_images(
        lambda m, x: (lambda y: (y + up(x**2, (24, 24)), y.amax((2, 3))))(up(x, (24, 24)))
    ),
    "three-by-three-after-resize": lambda: of_images(lambda m, x: m.c(up(x, (24, 24))), c=conv(3, 2, 3)),
    "pointwise-after-shrinking": lambda: of_images(lambda m, x: m.c(up(x, (5, 5))), c=conv(3, 2, 1)),
    "pointwise-padded": lambda: of_images(lambda m, x: m.c(up(x, (24, 24))), c=conv(3, 2, 1, padding=1)),
    "pointwise-groups": lambda: of_images(lambda m, x: m.c(up(x, (24, 24))), c=conv(3, 3, 1, groups=3)),
    "tokens-of-the-other-axis": lambda: of_images(
        lambda m, x: m.l(up(x).permute(0, 3, 2, 1)), (12, 6, 12), l=nn.Linear(12, 4)
    ),
    "other-strides": lambda: of_images(
        lambda m, x: (m.a(x), m.b(x)), a=conv(3, 4, 3, padding=1), b=conv(3, 4, 3, padding=1, stride=2)
    ),
    "other-inputs": lambda: of_images(lambda m, x: (m.a(x), m.b(x.relu())), a=conv(3, 4, 3), b=conv(3, 4, 3)),
    "weights-that-depend-on-the-input": lambda: of_images(lambda m, x: F.linear(x, x[0]) * 2 + 1, (8, 8)),
}


@pytest.mark.parametrize(
    "name",  # an export each: a third of them in every run
    [pytest.param(name, marks=[pytest.mark.slow] * bool(index % 3)) for index, name in enumerate(ALONE)],
)
def test_look_alikes_stay_as_they_are(name: str) -> None:
    model, x = ALONE[name]()
    captured = capture(model, x, dynamic=SMALL)
    assert rewrite(captured, FOLDS) is captured


@torch.no_grad()
@pytest.mark.parametrize("name", ["teacher-statistics", "linear-linear-norm"])
def test_bf16_folds_round_once(name: str) -> None:
    model, x = FIRES[name][1]()
    captured = capture(model, x, dynamic=SMALL, precision="bf16")
    rewritten = rewrite(captured)
    assert rewritten.rewrites
    (got,), (before,), (exact,) = rewritten.program.module()(x), captured.program.module()(x), capture_exact(model, x)
    assert got.dtype == torch.float32
    assert (got - exact).norm() <= 1.1 * (before - exact).norm()
    constants = dict(rewritten.program.named_buffers())
    folded = [value for key, value in constants.items() if "_rewritten_" in key]
    assert folded
    single = rewrite(capture(model, x, dynamic=SMALL)).program
    kept = [value for key, value in single.named_buffers() if "_rewritten_" in key]
    for low, high in zip(folded, kept, strict=True):
        assert low.equal(high.to(low.dtype))


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_fp16_keeps_what_would_not_fit(scale: float) -> None:
    """Weights of float16 times a scale that float32 has room for: nothing may be lost."""
    model, x = of_images(
        lambda m, x: m.c(x).float() * m.s, c=conv(3, 4, 3), s=torch.tensor([[1.0], [scale]] * 2)[..., None]
    )
    captured = capture(model, x, dynamic=SMALL, precision="fp16")
    assert rewrite(captured) is captured
    assert rewrite(capture(model, x, dynamic=SMALL, precision="bf16")).rewrites == ["affine_into_output"]


def test_bf16_subtracts_first() -> None:
    model, x = FIRES["normalized-images"][1]()
    captured = rewrite(capture(model, x, dynamic=SMALL, precision="bf16"))
    assert captured.rewrites == ["normalization_into_input"]  # the division; bf16 of W / std times bf16 of x - mean
    assert any(node.target is torch.ops.aten.sub.Tensor for node in captured.program.graph.nodes)


def test_passes_by_name() -> None:
    model, x = FIRES["linear-linear-norm"][1]()
    captured = capture(model, x, dynamic=SMALL)
    assert rewrite(captured, ["linear_into_linear"]).rewrites == ["linear_into_linear"]
    assert rewrite(captured, []) is captured
    assert set(PASSES) - set(DEFAULT) == {"shared_convolution", "normalization_into_padding", *FOR_CPUS}
    assert set(default_passes("aoti", "cpu")) - set(DEFAULT) == set(FOR_CPUS)
    assert default_passes("openvino", "cpu") == default_passes("aoti", "cuda") == DEFAULT
    with pytest.raises(PlanError, match=f"no rewrite named 'fold'; there are {PASSES[0]}, "):
        rewrite(captured, ["fold"])


def _anomalies(m: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A small network with every pattern in it."""
    y = normalized(x)
    t, s = (m.t(y) - m.mean) / m.std, m.s(y)
    tokens = torch.cat([t, up(s[:, :, ::2, ::2], (10, 10))], 1).permute(0, 2, 3, 1).reshape(-1, 16)
    rows = m.n(m.b(m.a(tokens))).relu().view(-1, 10, 10, 4).amax((1, 2))
    maps: Sequence[torch.Tensor] = [((t - s) ** 2).mean(1, keepdim=True), (s**2).mean(1, keepdim=True)]
    first, second = ((up(F.pad(v, (1, 1, 1, 1)), (24, 24)) - 0.1) / 0.4 for v in maps)
    return rows, 0.5 * first + 0.5 * second + m.p(x - MEAN)[:, :, :1, :1]


def test_a_plan_names_its_rewrites_and_its_receipt_proves_them(tmp_path: Path) -> None:
    model, x = of_images(
        _anomalies,
        t=conv(3, 8, 3),
        s=conv(3, 8, 3),
        p=conv(3, 1, 3, padding=1),
        a=nn.Linear(16, 16),
        b=nn.Linear(16, 4),
        n=nn.BatchNorm1d(4),
        mean=torch.rand(8, 1, 1),
        std=torch.rand(8, 1, 1) + 0.5,
    )
    plan = build(model, x, tmp_path / "a.plan", dynamic=SMALL, rewrite=PASSES)
    assert sorted(plan.manifest.rewrites) == sorted(set(PASSES) - ABSENT)
    assert max(output.max_rel for output in plan.manifest.receipt.outputs) < 1e-5
    with torch.no_grad(), Session(plan.path) as session:
        outputs = session.run(x[:2]).values()
        for got, wanted in zip(outputs, model.forward(x[:2]), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
