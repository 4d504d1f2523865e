"""The final state of a linear recurrence against its definition step by step, the layer, and the messages."""

from collections.abc import Callable

import pytest
import torch

from planmill.kernels.attention import LinearRecurrence, reach_final_state
from planmill.kernels.attention.linear_recurrence.reference import final_state_reference
from planmill.kernels.common.inputs import normal, strided


@pytest.mark.parametrize("count", [0, 1, 2, 3, 7, 8, 9, 121])
def test_final_state_equals_its_steps(count: int) -> None:
    g = torch.Generator().manual_seed(count)
    transition = normal(g, torch.float32, 12, 12, scale=0.25)
    projection, bias = normal(g, torch.float32, 12, 5), normal(g, torch.float32, 12)
    for x in (normal(g, torch.float32, 3, count, 5), strided(normal(g, torch.bfloat16, 3, count, 5))):
        got = reach_final_state(x, transition, projection, bias)
        want = final_state_reference(x, transition, projection, bias)
        torch.testing.assert_close(got.double(), want, atol=1e-5, rtol=1e-5)
    got = reach_final_state(x.half(), 1.1 * torch.eye(12), projection.half())  # a growing state
    want = final_state_reference(x, 1.1 * torch.eye(12), projection.half(), torch.zeros(12))
    assert got.dtype is torch.float32
    torch.testing.assert_close(got.double(), want, atol=float(want.abs().max()) * 2e-3 + 1e-6, rtol=2e-3)


def test_layer() -> None:
    """Its two maps, step by step; one graph; export with a dynamic batch; strides; a sample alone."""
    torch.manual_seed(0)
    torch.compiler.reset()
    layer, x = LinearRecurrence(5, 8).eval(), torch.randn(2, 6, 5)
    with torch.no_grad():
        s = torch.zeros(2, 8)
        for t in range(6):
            s = layer.transition(s) + layer.projection(x[:, t])
        torch.testing.assert_close(layer(x), s)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), s)
        program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        more = torch.randn(7, 6, 5)
        torch.testing.assert_close(program.module()(more), layer(more))
        torch.testing.assert_close(layer(more[3:4]), layer(more)[3:4])
        torch.testing.assert_close(layer(strided(x)), layer(x))
        assert layer.bfloat16()(x.bfloat16()).dtype is torch.bfloat16


def test_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = ((2, 7, 5), (8, 8), (8, 5), (8,))
    mine = [normal(g, torch.float32, *shape, scale=0.3).requires_grad_() for shape in shapes]
    theirs = [x.detach().double().requires_grad_() for x in mine]
    reach_final_state(*mine).square().sum().backward()
    final_state_reference(*theirs).square().sum().backward()
    for a, b in zip(mine, theirs, strict=True):
        assert a.grad is not None
        torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-4)


X, W, V = torch.zeros(2, 3, 4), torch.zeros(6, 6), torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: reach_final_state(X[0], W, V), ValueError, r"reach_final_state: x must be \[B, T, D\], got \[3, 4\]"),
        (lambda: reach_final_state(X.int(), W, V), TypeError, "x must be float32.* got torch.int32"),
        (lambda: reach_final_state(X, W[1:], V), ValueError, r"transition must be \[5, 5\], got \[5, 6\]"),
        (lambda: reach_final_state(X, W, V[:, 1:]), ValueError, r"projection must be \[6, 4\], got \[6, 3\]"),
        (lambda: reach_final_state(X, W, V, W[0, 1:]), ValueError, r"bias must be \[6\], got \[5\]"),
        (lambda: reach_final_state(X, W.to("meta"), V), ValueError, "transition must be on cpu like x, got meta"),
    ],
)
def test_messages(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
