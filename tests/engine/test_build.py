"""The pipeline around a target: receipts, refusals, and a file that is replaced only by a plan that passed."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import nn

from planmill.engine import DynamicDim, Plan, PlanError, Session, Tolerance, build, capture, targets
from planmill.engine.targets import Built
from planmill.engine.verify import compare, plan_cases, verify


@pytest.fixture
def fake_target(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A target that runs the program in PyTorch and then changes its outputs with `spoil`."""
    module: Any = ModuleType("fake_target")
    module.spoil = lambda outputs: outputs

    def compile_program(captured: Any, folder: Path, options: Any) -> Built:
        module.program = captured.program.module()
        (folder / "fake.bin").write_bytes(b"fake")
        return Built(folder / "fake.bin")

    def load_payload(path: Path, manifest: Any = None) -> Callable[..., list[torch.Tensor]]:
        def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            with torch.no_grad():
                return list(module.spoil(list(module.program(*inputs))))

        return run

    module.compile_program, module.load_payload = compile_program, load_payload
    monkeypatch.setitem(sys.modules, "fake_target", module)
    monkeypatch.setitem(targets.TARGETS, "fake", "fake_target")
    return module


SMALL = DynamicDim("batch", 1, 2, 4)


def test_stages_and_result(perceptron: nn.Module, fake_target: ModuleType, tmp_path: Path) -> None:
    seen: list[tuple[str, float]] = []
    path = tmp_path / "a.plan"
    plan = build(
        perceptron, torch.randn(1, 6), path, target="fake", dynamic=SMALL, progress=lambda *step: seen.append(step)
    )
    assert list(dict.fromkeys(stage for stage, _ in seen)) == ["capture", "compile", "verify", "write"]
    assert ("verify", 1.0) in seen
    assert Plan.read(path).manifest == plan.manifest
    assert path.stat().st_mode & 0o444 == 0o444 & ~_umask()
    assert Session(path)(torch.randn(3, 6)).shape == (3, 3)  # type: ignore[union-attr]
    assert [p.name for p in tmp_path.iterdir()] == ["a.plan"]


def _umask() -> int:
    import os

    mask = os.umask(0)
    os.umask(mask)
    return mask


def _poison(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
    outputs[0][-1, -1] = float("nan")
    return outputs


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_poison, "output output: NaN, or an infinity"),
        (lambda o: [o[0] + 0.01], "output output is out of tolerance: largest error .* is 0.0.*, allowed is 0.0001"),
        (lambda o: [-o[0]], "out of tolerance"),
        (lambda o: [o[0][:1]], r"the plan gives torch.float32 \(1, 3\) where the model gives torch.float32 \(2, 3\)"),
        (lambda o: [o[0].double()], "the plan gives torch.float64"),
    ],
    ids=["nan", "shift", "sign", "shape", "dtype"],
)
def test_failing_receipt_leaves_the_old_file(
    perceptron: nn.Module,
    perceptron_plan: Plan,
    fake_target: Any,
    tmp_path: Path,
    spoil: Callable[..., Any],
    message: str,
) -> None:
    path = tmp_path / "old.plan"
    path.write_bytes(perceptron_plan.path.read_bytes())
    fake_target.spoil = spoil
    with pytest.raises(PlanError, match=message):
        build(perceptron, torch.randn(1, 6), path, target="fake", dynamic=SMALL)
    assert path.read_bytes() == perceptron_plan.path.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["old.plan"]


def test_real_plan_out_of_a_tight_tolerance(perceptron: nn.Module, tmp_path: Path) -> None:
    nothing = Tolerance(cosine=0.5, max_rel=0.0)
    with pytest.raises(PlanError, match=r"out of tolerance: largest error .* allowed is 0;"):
        build(perceptron, torch.randn(1, 6), tmp_path / "a.plan", precision="bf16", dynamic=SMALL, tolerance=nothing)
    assert not list(tmp_path.iterdir())


def test_model_that_gives_nan_never_passes(fake_target: ModuleType, tmp_path: Path) -> None:
    class Roots(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sqrt()

    with pytest.raises(PlanError, match="NaN"):
        build(Roots().eval(), torch.randn(2, 6), tmp_path / "a.plan", target="fake", dynamic=SMALL)
    build(
        Roots().eval(),
        torch.randn(2, 6),
        tmp_path / "a.plan",
        target="fake",
        dynamic=SMALL,
        sample=lambda sizes, generator: [torch.rand(sizes["batch"], 6, generator=generator)],
    )


class Pairs(nn.Module):
    """Takes two rows or more, and says so only when it runs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not torch.compiler.is_compiling() and x.shape[0] < 2:
            raise ValueError(f"pairs: x must have at least 2 rows,\ngot {list(x.shape)}")
        return x - x.mean(0)


@pytest.mark.parametrize(
    ("who", "message"),
    [
        ("model", r"the model does not run at batch = 1: ValueError: pairs: x must have at least 2 rows,: narrow the"),
        ("plan", r"the plan does not run at batch = 2: RuntimeError: out of luck: narrow the range of sizes, or give"),
    ],
)
def test_a_size_at_which_it_does_not_run_is_one_error(
    fake_target: ModuleType, tmp_path: Path, who: str, message: str
) -> None:
    def spoil(outputs: list[torch.Tensor]) -> list[torch.Tensor]:
        raise RuntimeError("out of luck")

    if who == "plan":
        fake_target.spoil = spoil  # type: ignore[attr-defined]
    dynamic = DynamicDim("batch", 1 if who == "model" else 2, 3, 4)
    with pytest.raises(PlanError, match=message):
        build(Pairs().eval(), torch.randn(3, 6), tmp_path / "a.plan", target="fake", dynamic=dynamic)
    assert not list(tmp_path.iterdir())


def test_refused_before_any_work(perceptron: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planmill.engine.pipeline.capture", None)
    x = torch.randn(1, 6)
    with pytest.raises(PlanError, match="no target named 'tpu'; there is aoti, tensorrt-rtx, tensorrt"):
        build(perceptron, x, tmp_path / "a.plan", target="tpu")
    with pytest.raises(PlanError, match="no directory"):
        build(perceptron, x, tmp_path / "missing" / "a.plan")
    for metadata in ({"x": float("nan")}, {"x": {1, 2}}, {"x": (1, 2)}, {3: "x"}):
        with pytest.raises(PlanError, match="metadata must be plain JSON"):
            build(perceptron, x, tmp_path / "a.plan", metadata=metadata)  # type: ignore[arg-type]


def test_no_compiler(perceptron: nn.Module, tmp_path: Path) -> None:
    missing = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/g++",)})
    with missing, pytest.raises(PlanError, match=r"needs a C\+\+ compiler: install g\+\+"):
        build(perceptron, torch.randn(1, 6), tmp_path / "a.plan")


def test_cases_cover_the_range(several: nn.Module) -> None:
    examples = (torch.tensor([[0, 10, 3, 4, 5]]), torch.ones(1), torch.ones(1, 5, dtype=torch.bool))
    captured = capture(several, examples)
    assert [case["batch"] for case in plan_cases(captured.dynamic)] == [1, 5, 8, 64]
    seen: list[list[torch.Tensor]] = []

    def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        seen.append(inputs)
        with torch.no_grad():
            return list(captured.reference(*inputs))

    receipt = verify(run, captured, Tolerance(cosine=1, max_rel=0))
    assert [len(inputs[0]) for inputs in seen] == [1, 5, 8, 64]
    tokens = torch.cat([inputs[0].flatten() for inputs in seen])
    assert (int(tokens.min()), int(tokens.max())) == (0, 10)
    assert [output.name for output in receipt.outputs] == ["mean", "count", "any"]
    assert plan_cases({}) == [{}, {}, {}]


def test_numbers_of_a_receipt() -> None:
    wanted = torch.tensor([3.0, -4.0, 0.0])
    got = compare("y", torch.tensor([3.0, -4.0, 1.0]), wanted)
    assert (got.max_abs, got.max_rel) == (1.0, 0.25)
    assert got.cosine == pytest.approx(25 / (5 * 26**0.5))
    same = compare("y", torch.zeros(3), torch.zeros(3))
    assert (same.max_abs, same.max_rel, same.cosine) == (0, 0, 1)
    assert compare("y", torch.ones(3), torch.zeros(3)).max_rel == float("inf")
    infinite = torch.tensor([float("inf"), 1.0])
    assert compare("y", infinite, infinite).cosine == 1
    assert compare("y", -infinite, infinite).cosine != 1
    assert compare("y", torch.tensor([1, 2, 3, 4]), torch.tensor([1, 2, 3, 9])).mismatched == 0.25
    assert compare("y", torch.empty(0), torch.empty(0)).cosine == 1
    # float64: a difference that float32 sums would lose
    big = torch.full((1_000_000,), 1e4)
    assert compare("y", big + 1e-3, big).cosine > 1 - 1e-12
