"""AOTInductor plans for a GPU: what stands around the package, with the CPU in the GPU's place, and one on a device.

The program that is compiled is tested in test_substitution.py. What only a GPU shows is the test marked gpu.
"""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, PlanError, Session, build
from planmill.engine.graphs import Device
from planmill.engine.manifest import Gpu
from planmill.engine.plan import Plan
from planmill.engine.targets import TARGETS, OnDevice, aoti, choose_device
from planmill.kernels.moments import covariance_moments
from planmill.kernels.routing import route_tokens, score_experts

HOST = torch.device("cpu")


class Host(Device):
    """The CPU as a device whose graph is the run itself."""

    def __init__(self) -> None:
        super().__init__(HOST)
        self.captures = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        yield

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        run()
        return run


def test_every_target_has_devices() -> None:
    assert {target: choose_device(target, None) for target in TARGETS} == {
        "aoti": "cpu", "openvino": "cpu", "tensorrt": "cuda", "tensorrt-rtx": "cuda",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("target", "device", "message"),
    [
        ("openvino", "cuda", "target openvino builds plans for cpu, got device 'cuda'"),
        ("tensorrt", "cpu", "target tensorrt builds plans for cuda, got device 'cpu'"),
        ("aoti", "tpu", "target aoti builds plans for cpu and cuda, got device 'tpu'"),
        ("aoti", "cuda", "target aoti --device cuda needs a GPU to build on: .*: use a machine with an NVIDIA GPU"),
    ],
)
def test_a_device_that_cannot_be(
    target: str, device: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(PlanError, match=message):
        build(nn.ReLU().eval(), torch.ones(1, 2), tmp_path / "a.plan", target=target, device=device)  # type: ignore[arg-type]


class Payload:
    """x [rows, columns], scale [1] -> the product and its row sums."""

    def __call__(self, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        x, scale = inputs
        inputs.clear()  # a package takes the tensors away
        product = x * scale
        return [product, product.sum(1)]


def assert_right(got: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    assert torch.equal(got[0], given[0] * given[1])
    assert torch.equal(got[1], (given[0] * given[1]).sum(1))


def inputs(rows: int) -> list[torch.Tensor]:
    return [torch.randint(-9, 9, (rows, 3)).float(), torch.tensor([2.0])]


def test_a_runner_replays_a_graph_per_shape() -> None:
    payload, device = Payload(), Host()
    run = aoti.GpuRunner(payload, device)
    assert isinstance(run, OnDevice)
    given = inputs(2)
    assert_right(run(given), given)
    assert len(given) == 2  # the caller's list is the caller's
    run.record_graphs()
    kept = []
    for rows in (2, 3, 2, 3, 2, 2, 3):
        given = inputs(rows)
        kept.append((run(given), given))
    for got, given in kept:  # a replay overwrites no result that was handed out
        assert_right(got, given)
    assert device.captures == 2


def test_a_session_replays_graphs_of_a_package(
    perceptron_plan: Plan, perceptron: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package is the CPU's, loaded as one for a GPU is."""
    device = Host()
    monkeypatch.setattr(
        aoti, "load_payload", lambda path, manifest: aoti.GpuRunner(aoti._native(path, single_threaded=True), device)
    )
    with Session(perceptron_plan.path, cuda_graphs=True) as session:
        for batch in (3, 3, 5, 3, 5, 5):
            x = torch.randn(batch, 6)
            torch.testing.assert_close(session(x), perceptron(x), atol=1e-5, rtol=1e-5)
    assert device.captures == 2


@pytest.mark.parametrize(
    ("here", "message"),
    [
        (None, "built for a GPU of compute capability 8.6 .A card., and torch .*: use a machine with an NVIDIA GPU"),
        ((9, 0), r"capability 8.6 .A card.; this one has 9.0 .Another card.: build it again"),
        ((8, 0), r"capability 8.6 .A card.; this one has 8.0"),
        ((8, 6), ""),
        ((8, 9), ""),
    ],
    ids=["none", "later", "earlier", "same", "later_minor"],
)
def test_a_plan_for_another_gpu(
    here: tuple[int, int] | None, message: str, perceptron_plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(name="A card", sm=86, plugin_mode="aot", kernels={})
    plan = Plan(perceptron_plan.path, perceptron_plan.manifest.model_copy(update={"device": "cuda", "gpu": gpu}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: here)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Another card")
    if message:
        with pytest.raises(PlanError, match=message):
            plan.check_environment()
    else:
        plan.check_environment()


class Routed(nn.Module):
    """float32 [B, 16] -> weights of two of eight experts, and the moments of a set of tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.weight = nn.Linear(16, 16), nn.Parameter(torch.randn(8, 16))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.nn.functional.gelu(self.body(x))
        return route_tokens(score_experts(x, self.weight), 2)[0], covariance_moments(x[:, None] + x).covariance


@pytest.mark.gpu
def test_a_plan_on_the_device(tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    """Built, proven by its receipt, run with and without graphs, timed; nothing of ours is called from Python."""
    model = Routed().eval()
    plan = build(
        model, torch.randn(4, 16), tmp_path / "routed.plan", device="cuda", dynamic=DynamicDim("batch", 1, 4, 64)
    )
    manifest = plan.manifest
    assert manifest.device == "cuda"
    assert manifest.ops == []
    assert manifest.gpu is not None
    assert {"logits_kernel", "route_kernel", "sums_kernel"} <= manifest.gpu.kernels.keys()
    with Session(plan.path) as direct, Session(plan.path, cuda_graphs=True) as replayed:
        for batch in (1, 4, 7, 4, 7, 64, 4):
            x = torch.randn(batch, 16)
            for got, host, want in zip(replayed(x.cuda()), replayed(x), model(x), strict=True):
                assert got.is_cuda
                torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=1e-4)
                torch.testing.assert_close(host, want, atol=1e-4, rtol=1e-4)
        x = torch.randn(4, 16, device="cuda")
        for name, session in (("direct", direct), ("replayed", replayed)):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for step in range(120):
                if step == 20:
                    begin.record()
                session(x)
            end.record()
            end.synchronize()
            record_property(f"{name}_ms", begin.elapsed_time(end) / 100)
