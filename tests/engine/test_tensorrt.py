"""Building TensorRT-RTX plans without a GPU, and every way in which that fails: one PlanError, with the way out."""

import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from planmill.engine import DynamicDim, PlanError, capture
from planmill.engine.manifest import DimRange, Plugins, TensorSpec, shape_profile
from planmill.engine.targets import Options
from planmill.engine.tensorrt import builder, head, plan, process
from planmill.engine.tensorrt.builder import Job, Report
from planmill.errors import PlanmillError
from planmill.kernels.neighbors import GridIndex

WEIGHT = np.arange(6 * 40, dtype=np.float32).reshape(6, 40) / 100


def write(path: Path, *nodes: onnx.NodeProto) -> Path:
    """float32 x [rows, 6] -> y = x @ WEIGHT, or what `nodes` make of x, w and y's name."""
    graph = helper.make_graph(
        list(nodes) or [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("foreign", 1), helper.make_opsetid("planmill", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return path


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return Job(
        library="tensorrt_rtx",
        onnx=str(write(tmp_path / "small.onnx")),
        plan=str(tmp_path / "plan"),
        report=str(tmp_path / "report.json"),
        sms=[80, 86, 89, 120],
        profile={"x": [[1, 6], [8, 6], [64, 6]]},
        plugins=[],
    )


def run(job: Job, timeout_s: float | None = None, meddle: Callable[[process.Builder], Any] = lambda b: None) -> Report:
    with process.start_builder(Path(job.plan).parent) as started:
        meddle(started)
        return started.build(job, timeout_s=timeout_s)


def test_two_builds_are_the_same_bytes_and_hold_the_weights(job: Job, tmp_path: Path) -> None:
    report = run(job)
    made = Path(job.plan).read_bytes()
    assert report.layers == {"constant": 1, "matrix_multiply": 1}
    assert report.version == "1.7.1.116"
    assert report.plugins == {}
    assert WEIGHT.tobytes() in made
    assert head.read_head(Path(job.plan)) == head.PlanHead("1.7.1.116", (80, 86, 89, 120))
    run(job)
    assert Path(job.plan).read_bytes() == made


def test_a_half_precision_plan_for_turing(job: Job, tmp_path: Path) -> None:
    halves = helper.make_node("Cast", ["x"], ["h"], to=TensorProto.FLOAT16)
    weights = helper.make_node("Cast", ["w"], ["v"], to=TensorProto.FLOAT16)
    product = helper.make_node("MatMul", ["h", "v"], ["p"])
    back = helper.make_node("Cast", ["p"], ["y"], to=TensorProto.FLOAT)
    run(replace(job, onnx=str(write(tmp_path / "half.onnx", halves, weights, product, back)), sms=[75]))
    assert head.read_head(Path(job.plan)).sms == (75,)


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-700])
    return path


def with_node(job: Job, path: Path, domain: str) -> Job:
    return replace(job, onnx=str(write(path, helper.make_node("mystery", ["x"], ["y"], domain=domain))))


FAILURES: dict[str, tuple[Callable[[Job, Path], Job], str]] = {
    "hopper": (
        lambda job, path: replace(job, sms=[80, 90]),
        "cannot build for SM90; it can for SM75, .*: leave it out of --sm; data-centre GPUs take --target tensorrt",
    ),
    "turing": (lambda job, path: replace(job, sms=[75]), "FP32 GEMM is not supported.*--precision fp16"),
    "foreign_op": (
        lambda job, path: with_node(job, path, "foreign"),
        "cannot be parsed.*Plugin not found.*write that step with other ops",
    ),
    "our_op_unregistered": (
        lambda job, path: with_node(job, path, "planmill"),
        "cannot be parsed.*mystery.*--plugins python and none",
    ),
    "damaged": (lambda job, path: replace(job, onnx=str(truncated(write(path)))), "the ONNX file cannot be parsed"),
    "no_file": (lambda job, path: replace(job, onnx=str(path)), "the ONNX file cannot be parsed.*cannot be found"),
    "profile_of_a_stranger": (lambda job, path: replace(job, profile={"z": [[1, 6]] * 3}), "profile"),
    "profile_upside_down": (
        lambda job, path: replace(job, profile={"x": [[9, 6], [8, 6], [7, 6]]}),
        "profile.*--batch",
    ),
    "memory": (lambda job, path: replace(job, memory_bytes=1 << 20), "memory"),
}  # fmt: skip


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_build_is_one_error(job: Job, tmp_path: Path, failure: str) -> None:
    change, message = FAILURES[failure]
    with pytest.raises(PlanError, match=f"the TensorRT-RTX builder .*{message}") as caught:
        run(change(job, tmp_path / "other.onnx"))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 3000


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV], ids=lambda s: s.name)
def test_a_builder_that_dies_is_one_error(job: Job, number: signal.Signals) -> None:
    def kill(started: process.Builder) -> None:
        started.process.send_signal(signal.SIGSTOP)  # so that it has not finished before
        threading.Timer(0.1, started.process.send_signal, [number]).start()
        threading.Timer(0.2, started.process.send_signal, [signal.SIGCONT]).start()

    with pytest.raises(PlanError, match=f"the TensorRT-RTX builder was ended by {number.name}.*: "):
        run(job, meddle=kill)


def test_a_builder_that_hangs_is_one_error(job: Job) -> None:
    stopped: list[process.Builder] = []

    def stop(started: process.Builder) -> None:
        started.process.send_signal(signal.SIGSTOP)
        stopped.append(started)

    with pytest.raises(PlanError, match=r"did not finish within 0\.2 s"):
        run(job, 0.2, stop)
    assert stopped[0].process.poll() is not None


def test_an_export_that_fails_ends_the_builder(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="the export"), process.start_builder(tmp_path) as started:
        raise RuntimeError("the export")
    assert started.process.poll() is not None


def test_the_proof_is_made_while_the_builder_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture(nn.Linear(4, 3).eval(), torch.randn(2, 4), dynamic=DynamicDim("batch", 1, 2, 4))
    seen: list[tuple[str, bool]] = []

    def look(path: Path) -> None:
        onnx.checker.check_model(str(path))
        seen.append((path.name, (tmp_path / "report.json").exists()))

    built = plan.compile_captured(captured, tmp_path, Options(sms=(89,), meanwhile=look), "tensorrt_rtx")
    assert built.payload.exists()
    assert seen == [("model.onnx", False)]
    monkeypatch.setattr(plan, "_TOGETHER", 0)  # a large model's builder has the memory for itself
    with pytest.raises(PlanError, match="cannot build for SM90"):
        plan.compile_captured(captured, tmp_path, Options(sms=(90,), meanwhile=look), "tensorrt_rtx")
    assert len(seen) == 1


def test_a_proof_that_fails_ends_the_builder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path) -> None:
        raise PlanError("out of tolerance")

    started: list[process.Builder] = []
    start = process.Builder.start

    def remember(self: process.Builder, job: Job) -> None:
        started.append(self)
        start(self, job)

    monkeypatch.setattr(process.Builder, "start", remember)
    captured = capture(nn.Linear(4, 3).eval(), torch.randn(2, 4), dynamic=None)
    with pytest.raises(PlanError, match="out of tolerance"):
        plan.compile_captured(captured, tmp_path, Options(meanwhile=fail), "tensorrt_rtx")
    assert started[0].process.poll() == -signal.SIGKILL


def test_a_job_that_cannot_be_read_is_one_error(job: Job) -> None:
    with pytest.raises(PlanError, match=r"ended with code 1 and left no report; its log: .*TypeError"):
        run(replace(job, memory_bytes="much"))  # type: ignore[arg-type]


def test_damaged_files_never_take_the_parent_along(job: Job) -> None:
    """Six corruptions; where a damaged file is still a model, a plan may come of it."""
    whole = Path(job.onnx).read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(6):
        damaged = bytearray(whole)
        for _ in range(4):
            damaged[generator.integers(len(whole))] = generator.integers(256)
        Path(job.onnx).write_bytes(damaged)
        try:
            run(job, timeout_s=60)
        except PlanError:
            refused += 1
    assert refused


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda data: data[:30], "cut short: it has 30 bytes"),
        (lambda data: data[:-9], "cut short: 91 bytes of 100"),
        (lambda data: b"x" + data[1:], "no TensorRT-RTX plan"),
        (lambda data: data[:25] + b"\x09" + data[26:], "a plan of TensorRT-RTX 1.9.1.116, and .* of 1.7.1.116"),
    ],
    ids=["head", "tail", "magic", "version"],
)
def test_a_damaged_head_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = tmp_path / "plan"
    path.write_bytes(damage(head._HEAD.pack(b"vtrt", 2, 100, 1, 7, 1, 116, b"vtrt", 30).ljust(100)))
    with pytest.raises(PlanError, match=message):
        head.read_head(path)


def test_a_library_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PlanmillError, match=r"tensorrt_rtx is not installed: pip install 'planmill\[tensorrt\]'"):
        builder.import_library("tensorrt_rtx")
    with pytest.raises(PlanmillError, match="tensorrt is not installed: install tensorrt"):
        builder.import_library("tensorrt")


def test_profile_of_fixed_and_of_dynamic_inputs() -> None:
    inputs = [
        TensorSpec(name="x", dtype="float32", shape=["batch", 3, "side", "side"]),
        TensorSpec(name="y", dtype="float32", shape=[2, 3]),
    ]
    ranges = {"batch": DimRange(minimum=1, optimum=2, maximum=3), "side": DimRange(minimum=4, optimum=5, maximum=6)}
    assert shape_profile(inputs, ranges) == {
        "x": ([1, 3, 4, 4], [2, 3, 5, 5], [3, 3, 6, 6]),
        "y": ([2, 3], [2, 3], [2, 3]),
    }


class InDouble(nn.Module):
    """float32 [B, 4] -> float32 [B]; in float64 on the way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.double().cumsum(-1)[:, -1].float()


def test_float64_is_refused_by_name(tmp_path: Path) -> None:
    captured = capture(InDouble().eval(), torch.randn(2, 4), dynamic=DynamicDim("batch", 1, 2, 4))
    with pytest.raises(PlanError, match=r"TensorRT has no float64, which op aten.* takes or gives: cast to float32"):
        plan.compile_captured(captured, tmp_path, Options(), "tensorrt_rtx")


class Constrained(nn.Module):
    """Queries [B, 4] at positions [B, 2] among 9 rows; positions are compared in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.index = GridIndex(torch.randn(9, 4), positions=torch.rand(9, 2), radius=0.5)

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return self.index(x, 2, positions=at)[0]


@pytest.mark.parametrize("plugins", ["python", "none"])
def test_a_search_by_position_is_refused_by_name(tmp_path: Path, plugins: Plugins) -> None:
    captured = capture(Constrained().eval(), [torch.randn(2, 4), torch.rand(2, 2)], dynamic=None)
    with pytest.raises(PlanError, match=r"no float64, which op planmill.constrained_search.*: build with --target"):
        plan.compile_captured(captured, tmp_path, Options(plugins=plugins), "tensorrt_rtx")


def test_options_that_do_not_fit_the_library(tmp_path: Path) -> None:
    captured = capture(nn.Linear(4, 3).eval(), torch.randn(2, 4))
    with pytest.raises(PlanError, match=r"TensorRT-RTX has no way in for kernels.*--plugins python or none"):
        plan.compile_captured(captured, tmp_path, Options(plugins="aot"), "tensorrt_rtx")
    with pytest.raises(PlanError, match="target tensorrt builds for the GPU of this machine: leave out --sm"):
        plan.compile_captured(captured, tmp_path, Options(sms=(90,)), "tensorrt")
