"""The interpreter that stands for a processor with 16-bit units, against torch's own 16-bit arithmetic."""

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from planmill.cli.bench import load_benchmarks
from planmill.engine import capture

Rounded: Any = importlib.import_module(f"{load_benchmarks().__name__}.engine.sixteen_bit_scores").Rounded


@torch.no_grad()
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_rounded_computes_what_torch_does_in_sixteen_bits(precision: Any) -> None:
    torch.manual_seed(0)
    first, second = (
        nn.Conv2d(3, 32, 3, stride=2, padding=1),
        nn.Conv2d(32, 40, 4, padding=2),
    )  # the second by Winograd's
    tail = [nn.BatchNorm2d(40), nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(40, 8, 3, bias=False), nn.Flatten()]
    model = nn.Sequential(first, nn.ReLU(), second, *tail, nn.Linear(72, 5)).eval()
    x = torch.rand(2, 3, 20, 20)
    program = capture(model, x, dynamic=None, precision=precision).program.module(check_guards=False)
    (got,), (wanted,), single = Rounded(program).run(x), program(x), model(x)
    assert got.dtype == torch.float32
    lost = (wanted - single).abs().max()
    assert lost > 0
    assert (got - wanted).abs().max() <= 0.3 * lost  # sums in another order cross the edge of a rounding now and then
