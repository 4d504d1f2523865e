"""Rewrites of random graphs, none of them made to suit a pass: whatever fires, the program computes the same."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from planmill.engine import DynamicDim, capture
from planmill.engine.rewrites import PASSES, default_passes, rewrite

Shape = tuple[int, int, int]
EPS = {"fp32": 4e-7, "bf16": 8e-3, "fp16": 1e-3}


class Graph(nn.Module):
    """Pictures [B, C, H, W], each made by a step from pictures before it; the last one and some other are given."""

    def __init__(self, seed: int, wide: bool) -> None:
        super().__init__()
        self.draw, self.wide = random.Random(seed), wide
        self.layers, self.steps, self.shapes = nn.ModuleList(), list[Callable[..., torch.Tensor]](), list[Shape]()
        side = self.draw.randrange(14, 19) if wide else self.draw.randrange(8, 15)
        self.shapes.append((32 if wide else self.draw.choice([1, 3, 4]), side, self.draw.randrange(8, 15)))
        kinds = [self.conv, self.pointwise, self.norm, self.affine, self.affine, self.rest, self.resize, self.join]
        for _ in range(self.draw.randrange(4, 10)):
            self.draw.choice([*kinds, self.rows])()
        self.outputs = sorted({len(self.shapes) - 1, self.draw.randrange(len(self.shapes))} - {0}) or [0]
        self.eval()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        found = [x]
        for step in self.steps:
            found.append(step(self, found))
        return tuple(found[i] * 1 for i in self.outputs)

    def pick(self) -> tuple[int, Shape]:
        last = len(self.shapes) - 1
        i = last if self.draw.random() < 0.7 else self.draw.randrange(max(0, last - 3), last + 1)
        return i, self.shapes[i]

    def add(self, step: Callable[..., torch.Tensor], shape: Shape) -> None:
        if min(shape) > 0 and max(shape) <= 80:
            self.steps.append(step)
            self.shapes.append(shape)

    def layer(self, layer: nn.Module) -> int:
        self.layers.append(layer)
        return len(self.layers) - 1

    def constant(self, *shape: int) -> str:
        name = f"constant_{len(list(self.buffers()))}"
        self.register_buffer(name, 0.5 + torch.rand(shape))
        return name

    def conv(self) -> None:
        draw, (i, (c, h, w)) = self.draw, self.pick()
        out, size = draw.choice([32, 40] if self.wide else [1, 2, 3, 6]), draw.randrange(2, 6)
        stride, dilation = draw.choice([(1, 1), (1, 1), (2, 2), (1, 2)]), draw.choice([1, 1, 1, 2])
        groups = draw.choice(
            [g for g in range(1, c + 1) if c % g == 0 and out % g == 0] if draw.random() < 0.3 else [1]
        )
        padding = draw.choice([(0, 0), (0, 0), (1, 1), (2, 2), (1, 0)])
        if min(h, w) > dilation * (size - 1):
            layer = nn.Conv2d(c, out, size, stride, padding, dilation, groups, bias=draw.random() < 0.6)
            shape = layer(torch.zeros(1, c, h, w)).shape
            j = self.layer(layer)
            self.add(lambda m, v: m.layers[j](v[i]), (shape[1], shape[2], shape[3]))

    def pointwise(self) -> None:
        i, (c, h, w) = self.pick()
        j = self.layer(nn.Conv2d(c, out := self.draw.choice([1, 4, c]), 1, bias=self.draw.random() < 0.5))
        self.add(lambda m, v: m.layers[j](v[i]), (out, h, w))

    def norm(self) -> None:
        i, (c, h, w) = self.pick()
        layer = nn.BatchNorm2d(c)
        for value in (layer.running_mean, layer.weight, layer.bias):
            nn.init.uniform_(value, -2, 2)  # type: ignore[arg-type]
        j = self.layer(layer)
        self.add(lambda m, v: m.layers[j](v[i]), (c, h, w))

    def affine(self) -> None:
        i, (c, h, w) = self.pick()
        name = self.constant(*self.draw.choice([(c, 1, 1), (1, c, 1, 1), (), (1,), (h, w), (w,), (c, h, w)]))
        step: Any = self.draw.choice(
            [
                lambda x, k: x + k,
                lambda x, k: k - x,
                lambda x, k: x * k,
                lambda x, k: x / k,
                lambda x, k: (x - 0.5) / k,
                lambda x, k: torch.add(x, k, alpha=-2),
                lambda x, k: (x * 3 - 1) * 0.25,
            ]
        )
        self.add(lambda m, v: step(v[i], getattr(m, name)), (c, h, w))

    def rest(self) -> None:
        i, (c, h, w) = self.pick()
        step: Any = self.draw.choice([F.relu, torch.sigmoid, F.gelu, lambda x: F.avg_pool2d(x, 2)])
        h, w = step(torch.zeros(1, c, h, w)).shape[2:] if min(h, w) > 1 else (0, 0)
        self.add(lambda m, v: step(v[i]), (c, h, w))

    def resize(self) -> None:
        i, (c, h, w) = self.pick()
        size = self.draw.choice([(2 * h, 2 * w), (20, 20), (h + 1, w), (h // 2, w)])
        mode = self.draw.choice(["bilinear", "nearest", "bicubic"])
        self.add(lambda m, v: F.interpolate(v[i], size=size, mode=mode), (c, *size))

    def join(self) -> None:
        i, (c, h, w) = self.pick()
        j = self.draw.choice([n for n, shape in enumerate(self.shapes) if shape[1:] == (h, w)])
        if self.draw.random() < 0.5:
            self.add(lambda m, v: torch.cat([v[i], v[j]], 1), (c + self.shapes[j][0], h, w))
        elif self.shapes[j][0] in (1, c):
            self.add(lambda m, v: v[i] - v[j] if j % 2 else v[i] + v[j], (c, h, w))

    def rows(self) -> None:
        i, (c, h, w) = self.pick()
        first, out = self.draw.choice([c, 4]), self.draw.choice([1, 3, c])
        j, k = self.layer(nn.Linear(c, first)), self.layer(nn.Linear(first, out, bias=self.draw.random() < 0.5))
        if self.draw.random() < 0.5:
            self.add(lambda m, v: m.layers[k](m.layers[j](v[i].permute(0, 2, 3, 1))).permute(0, 3, 1, 2), (out, h, w))
        else:
            self.add(
                lambda m, v: m.layers[j](v[i].flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (h, w)),
                (first, h, w),
            )


def error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """The largest, over the largest value."""
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def check(seed: int, wide: bool = False, precision: Any = "fp32") -> list[str]:
    """Compare what passes make of a graph with the graph in float64; the passes that fired."""
    torch.manual_seed(seed)
    graph = Graph(seed, wide)
    x = torch.randn(3, *graph.shapes[0])
    dynamic = DynamicDim("batch", 1, 3, 4) if seed % 2 else None
    captured = capture(graph, x, dynamic=dynamic, precision=precision)
    sample = torch.rand(1 if dynamic else 3, *graph.shapes[0]) * 3
    exact, plain, fired = copy.deepcopy(graph).double()(sample.double()), captured.program.module()(sample), []
    for passes in (default_passes("aoti", "cpu"), PASSES):
        rewritten = rewrite(captured, passes)
        fired += rewritten.rewrites
        for got, before, wanted in zip(rewritten.program.module()(sample), plain, exact, strict=True):
            assert (got.shape, got.dtype) == (before.shape, before.dtype)
            if before.isfinite().all():  # float16 ends at 65504
                assert error(got, wanted) <= 5 * error(before, wanted) + 6 * EPS[precision], (seed, fired)
    return fired


@torch.no_grad()
def test_some_graphs() -> None:
    fired = [check(seed) for seed in (3, 5)] + [check(100, wide=True), check(200, precision="bf16")]
    assert all(fired)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_many_graphs(precision: str) -> None:
    fired = [name for seed in range(1000, 1040) for name in check(seed, precision=precision)]
    assert set(fired) >= {"affine_into_output", "linear_into_linear", "normalization_into_input"}


@torch.no_grad()
@pytest.mark.slow
def test_many_wide_graphs() -> None:
    fired = [name for seed in range(2000, 2030) for name in check(seed, wide=True)]
    assert "winograd_convolution" in fired
