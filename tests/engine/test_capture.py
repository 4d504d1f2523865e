"""What becomes a program, and what is refused with a clear word."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from planmill.engine import BATCH, DynamicDim, PlanError, capture


class Calls(nn.Module):
    """A model made of one function."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function
        self.linear = nn.Linear(4, 4)
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, self.linear(x))


def _count(model: Any, x: torch.Tensor) -> torch.Tensor:
    model.count += 1
    return x + model.count


def _running_mean(model: Any, x: torch.Tensor) -> torch.Tensor:
    """Writes its statistics without saying so: nothing in the op's schema tells."""
    return nn.functional.batch_norm(x, model.mean, torch.ones(4), training=True)


class WritesInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2)


def test_names_shapes_and_symbols() -> None:
    class Pair(nn.Module):
        def forward(self, left: torch.Tensor, right: torch.Tensor, bias: float = 1.0) -> dict[str, Any]:
            return {"sum": left + right + bias, "nested": (left[:, None].repeat(1, 2, 1), None)}

    length = DynamicDim("length", 2, 4, 6)
    dims = {"left": {0: BATCH, 1: length}, "right": {0: BATCH, 1: length}}
    got = capture(Pair().eval(), (torch.randn(3, 5), torch.randn(3, 5)), dynamic=dims)
    assert [str(spec) for spec in got.inputs] == ["float32 (batch, length)"] * 2
    assert [(spec.name, spec.shape) for spec in got.outputs] == [
        ("sum", ["batch", "length"]),
        ("nested.0", ["batch", 2, "length"]),
    ]
    assert got.dynamic.keys() == {"batch", "length"}
    assert [list(x.shape) for x in got.examples] == [[8, 4], [8, 4]]


def test_names_of_a_tuple_can_be_given() -> None:
    model = Calls(lambda m, x: (x, x + 1)).eval()
    assert [s.name for s in capture(model, torch.randn(1, 4)).outputs] == ["output_0", "output_1"]
    named = capture(model, torch.randn(1, 4), output_names=["a", "b"])
    assert [s.name for s in named.outputs] == ["a", "b"]
    with pytest.raises(PlanError, match="the model has 2 outputs, got 1 names"):
        capture(model, torch.randn(1, 4), output_names=["a"])


def test_dimensions_of_one_size_are_fixed() -> None:
    model = nn.Linear(4, 4).eval()
    for dynamic in (None, DynamicDim("batch", 3, 3, 3)):
        got = capture(model, torch.randn(3, 4), dynamic=dynamic)
        assert got.inputs[0].shape == [3, 4]
        assert got.dynamic == {}


def test_layout_follows_the_arithmetic() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), nn.Linear(4, 512), nn.Linear(512, 512)).eval()
    assert capture(patches, torch.randn(2, 3, 8, 8)).layout == "contiguous"
    assert capture(nn.Sequential(nn.Conv2d(3, 8, 3)).eval(), torch.randn(2, 3, 8, 8)).layout == "channels_last"
    assert capture(nn.ReLU().eval(), torch.randn(2, 3, 8, 8)).layout == "contiguous"


def test_a_model_that_is_at_odds_with_its_precision() -> None:
    model = Calls(lambda m, x: x @ torch.ones(4, 4)).eval()
    assert capture(model, torch.randn(2, 4)).ops == []
    with pytest.raises(PlanError, match="does not run in float16 on the example inputs: RuntimeError: expected"):
        capture(model, torch.randn(2, 4), precision="fp16")


def test_model_is_left_as_it_was() -> None:
    model = nn.Linear(4, 4).eval()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    capture(model, torch.randn(2, 4), precision="bf16")
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.weight.dtype == torch.float32
    assert model.weight.requires_grad


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda m, x: x.reshape(2, -1, 4), "fixes batch|does not run"),
        (lambda m, x: x + torch.ones(int(x.shape[0]), 4) * len(list(range(x.shape[0]))), "fixes batch to a size"),
        (lambda m, x: x if x.sum() > 0 else -x, "depends on the values of a tensor"),
        (lambda m, x: (x, 3), "output 1: must be a tensor, got int"),
        (lambda m, x: None, "returns no tensor"),
        (lambda m, x: x @ torch.ones(5, 5), "does not run on the example inputs: RuntimeError: mat1 and mat2"),
        (_count, r"changes its own state while it runs \(count\)"),
        (_running_mean, r"changes its own state while it runs \(mean\)"),
    ],
    ids=["reshape", "specialises", "data-dependent", "number", "nothing", "wrong shape", "state", "statistics"],
)
def test_refused(function: Callable[..., Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        capture(Calls(function).eval(), torch.randn(3, 4), dynamic=DynamicDim("batch", 1, 5, 9))


def test_refused_arguments() -> None:
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    cases: list[tuple[str, Callable[[], object]]] = [
        ("training mode", lambda: capture(nn.Linear(4, 4), x)),
        ("precision must be fp32, bf16 or fp16", lambda: capture(model, x, precision="int3")),  # type: ignore[arg-type]
        ("example_inputs is empty", lambda: capture(model, ())),
        ("input input: must be a torch.Tensor, got list", lambda: capture(model, [[1.0]])),  # type: ignore[list-item]
        ("must be on the CPU, got meta", lambda: capture(model, x.to("meta"))),
        ("no input named 'y'; there are input", lambda: capture(model, x, dynamic={"y": {0: BATCH}})),
        ("has dimensions 0 to 1, got 2", lambda: capture(model, x, dynamic={"input": {2: BATCH}})),
        ("size 0 in dimension 0", lambda: capture(model, x[:0])),
        ("writes into its inputs", lambda: capture(WritesInput().eval(), x)),
        ("1 <= min <= opt <= max, got 2:1:3", lambda: DynamicDim("batch", 2, 1, 3)),
        ("must be an identifier, got 'a b'", lambda: DynamicDim("a b")),
        (
            "given two ranges",
            lambda: capture(model, x, dynamic={"input": {0: BATCH, 1: DynamicDim("batch", 1, 2, 3)}}),
        ),
        (
            "disagree on dimension 0 (left 2, right 3)",
            lambda: capture(nn.Bilinear(4, 4, 2).eval(), {"left": x, "right": torch.randn(3, 4)}),
        ),
    ]
    for message, call in cases:
        with pytest.raises(PlanError, match=re.escape(message)):
            call()
