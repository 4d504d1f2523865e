"""Ops registered in Python inside a plan: ours, which a session registers, and a stranger's, which the user imports."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, PlanError, Session, build
from planmill.kernels.neighbors.mutual_score import score_mutually

LIBRARY = torch.library.Library("planmilltest", "FRAGMENT")
LIBRARY.define("scale_and_shift(Tensor x, float scale, int shift, bool negate, str how) -> (Tensor, Tensor)")
LIBRARY.define("shapeless(Tensor x) -> Tensor")
LIBRARY.define("turned(Tensor x, complex by) -> Tensor")
LIBRARY.define("counted(Tensor x) -> SymInt")


def scale_and_shift(
    x: torch.Tensor, scale: float, shift: int, negate: bool, how: str
) -> tuple[torch.Tensor, torch.Tensor]:
    y = (-x if negate else x) * scale + shift
    return (y.abs() if how == "absolute" else y), y.argmax(-1).to(torch.int32)


LIBRARY.impl("scale_and_shift", scale_and_shift, "CompositeExplicitAutograd")
LIBRARY.impl("shapeless", lambda x: x[x > 0], "CPU")


@torch.library.register_fake("planmilltest::scale_and_shift", lib=LIBRARY)
def _(x: torch.Tensor, scale: float, shift: int, negate: bool, how: str) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=torch.int32)


LIBRARY.impl("turned", lambda x, by: x * by.real, "CompositeExplicitAutograd")
LIBRARY.impl("counted", lambda x: int((x > 0).sum()), "CompositeExplicitAutograd")
torch.library.register_fake("planmilltest::turned", lambda x, by: torch.empty_like(x), lib=LIBRARY)
torch.library.register_fake("planmilltest::counted", lambda x: torch.library.get_ctx().new_dynamic_size(), lib=LIBRARY)


class Scored(nn.Module):
    """float32 [N, 9, 4] -> float32 [N, 9], through an op of ours."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 6)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return score_mutually(self.project(features), 0.0, 0.5)


class Foreign(nn.Module):
    """float32 [B, 5] -> float32 [B, 5], int32 [B], through an op of the test's."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, index = torch.ops.planmilltest.scale_and_shift(x.sin(), 2.5, -3, True, "absolute")
        return y + 1, index


class Shapeless(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.planmilltest.shapeless(x)


def test_our_op_in_a_fresh_process(tmp_path: Path) -> None:
    """The fresh process imports nothing but the session."""
    torch.manual_seed(0)
    model = Scored().eval()
    plan = build(model, torch.randn(5, 9, 4), tmp_path / "own.plan", dynamic=DynamicDim("images", 2, 5, 8))
    assert plan.manifest.ops == ["planmill::mutual_score", "planmill::packed_linear"]
    x = torch.randn(7, 9, 4)
    with torch.no_grad():
        torch.save((x, model(x)), tmp_path / "own.pt")
    program = (
        "import sys, torch\n"
        "from planmill.engine import Session\n"
        "x, wanted = torch.load(sys.argv[2])\n"
        "torch.testing.assert_close(Session(sys.argv[1])(x), wanted, atol=1e-5, rtol=1e-5)\n"
    )
    arguments = [sys.executable, "-c", program, str(plan.path), str(tmp_path / "own.pt")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_foreign_op(tmp_path: Path) -> None:
    plan = build(Foreign().eval(), torch.randn(2, 5), tmp_path / "foreign.plan")
    assert plan.manifest.ops == ["planmilltest::scale_and_shift"]
    x = torch.randn(3, 5)
    got, index = Session(plan.path)(x)
    wanted, wanted_index = Foreign()(x)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(index, wanted_index)
    program = f"from planmill.engine import Session; Session({str(plan.path)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "PlanError" in done.stderr
    assert "calls the op planmilltest::scale_and_shift, which is not registered: import the package" in done.stderr


def test_op_that_cannot_be_captured_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"op planmilltest\.shapeless.*register_fake"):
        build(Shapeless().eval(), torch.randn(2, 5), tmp_path / "no.plan")
    assert not list(tmp_path.iterdir())


class Turned(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.planmilltest.turned(x, 2j)


class Counted(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.ops.planmilltest.counted(x)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Turned(), r"cannot lower op planmilltest\.turned\.default: argument by is of type complex"),
        (
            Counted(),
            r"cannot lower op planmilltest\.counted\.default: a result is of type \w+, and a plan passes",
        ),
    ],
)
def test_op_that_cannot_be_lowered_is_named(tmp_path: Path, model: nn.Module, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        build(model.eval(), torch.randn(2, 5), tmp_path / "no.plan")
    assert not list(tmp_path.iterdir())
