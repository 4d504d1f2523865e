"""A plan computes what its model computes, and says what does not fit."""

import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Set
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from planmill.engine import DynamicDim, Plan, PlanError, Session, build


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 9])
def test_dynamic_batch(perceptron: nn.Module, perceptron_plan: Plan, batch: int) -> None:
    x = torch.randn(batch, 6)
    with torch.no_grad():
        torch.testing.assert_close(Session(perceptron_plan.path)(x), perceptron(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("sizes", [(1, 4, 4), (2, 8, 9), (3, 7, 11), (5, 13, 13)])
def test_convolutional_model_is_channels_last(
    convolutional: nn.Module, convolutional_plan: Plan, sizes: tuple[int, int, int]
) -> None:
    assert convolutional_plan.manifest.layout == "channels_last"
    batch, height, width = sizes
    x = torch.randn(batch, 3, height, width)
    session = Session(convolutional_plan.path)
    with torch.no_grad():
        wanted = convolutional(x)
    torch.testing.assert_close(session(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(session(x.to(memory_format=torch.channels_last)), wanted, atol=1e-5, rtol=1e-5)


def test_bf16_keeps_the_boundary_of_the_model(perceptron: nn.Module, bf16_plan: Plan) -> None:
    x = torch.randn(5, 6)
    got = Session(bf16_plan.path)(x)
    assert isinstance(got, torch.Tensor)
    with torch.no_grad():
        wanted = perceptron(x)
    assert got.dtype == torch.float32
    assert not torch.equal(got, wanted)
    torch.testing.assert_close(got, wanted, atol=3e-2, rtol=3e-2)
    assert next(perceptron.parameters()).dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 5, 64])
def test_several_inputs_and_outputs(several: nn.Module, several_plan: Plan, batch: int) -> None:
    inputs = {
        "keep": torch.rand(batch, 5) < 0.5,
        "tokens": torch.randint(0, 11, (batch, 5)),
        "weight": torch.randn(batch),
    }
    session = Session(several_plan.path)
    wanted = several(**inputs)
    got = session.run(inputs)
    assert list(got) == ["mean", "count", "any"]
    for name, value in got.items():
        torch.testing.assert_close(value, wanted[name].detach())
    in_order = session(inputs["tokens"], inputs["weight"], inputs["keep"])
    assert isinstance(in_order, tuple)
    assert all(torch.equal(a, b) for a, b in zip(in_order, got.values(), strict=True))


def test_strided_and_differentiable_inputs(perceptron: nn.Module, perceptron_plan: Plan) -> None:
    x = torch.randn(6, 8).T[1:8:2].requires_grad_()
    got = Session(perceptron_plan.path)(x)
    assert isinstance(got, torch.Tensor)
    assert not got.requires_grad
    torch.testing.assert_close(got, perceptron(x).detach(), atol=1e-6, rtol=1e-5)


def test_outputs_are_new_each_time(perceptron_plan: Plan) -> None:
    session, x = Session(perceptron_plan.path), torch.randn(3, 6)
    first = session(x)
    assert isinstance(first, torch.Tensor)
    kept = first.clone()
    session(torch.randn(3, 6))
    assert torch.equal(first, kept)


@pytest.mark.usefixtures("two_threads")
def test_threads_follow_torch(perceptron: nn.Module, perceptron_plan: Plan) -> None:
    session, x = Session(perceptron_plan.path), torch.randn(9, 6)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append(session(x))
    torch.testing.assert_close(results[0], results[1])


def test_one_session_in_several_threads(perceptron: nn.Module, perceptron_plan: Plan) -> None:
    session = Session(perceptron_plan.path)
    inputs = [torch.randn(1 + i % 9, 6) for i in range(32)]
    outputs: dict[int, object] = {}

    def work(start: int) -> None:
        for i in range(start, 32, 4):
            outputs[i] = session(inputs[i])

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    with torch.no_grad():
        for i, x in enumerate(inputs):
            torch.testing.assert_close(outputs[i], perceptron(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.randn(2, 6, dtype=torch.float64), r"input x: expected float32 \(batch, 6\), got float64 \(2, 6\)"),
        (torch.randn(2, 7), r"input x: expected float32 \(batch, 6\), got float32 \(2, 7\)"),
        (torch.randn(6), r"input x: expected float32 \(batch, 6\), got float32 \(6,\)"),
        (torch.randn(0, 6), r"got float32 \(0, 6\): batch must be 1 to 9"),
        (torch.randn(10, 6), r"got float32 \(10, 6\): batch must be 1 to 9"),
        (torch.randn(2, 6, device="meta"), r"got float32 \(2, 6\) on meta"),
        ([[1.0] * 6], r"input x: expected float32 \(batch, 6\), got list"),
    ],
    ids=["dtype", "size", "rank", "too small", "too large", "device", "no tensor"],
)
def test_input_that_does_not_fit(perceptron_plan: Plan, x: torch.Tensor, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Session(perceptron_plan.path)(x)


def test_inputs_that_do_not_fit_together(several_plan: Plan) -> None:
    session = Session(several_plan.path)
    tokens, weight, keep = torch.zeros(3, 5, dtype=torch.int64), torch.ones(2), torch.ones(3, 5, dtype=torch.bool)
    with pytest.raises(PlanError, match=r"input weight: .* batch is 3 on an input before it"):
        session(tokens, weight, keep)
    with pytest.raises(PlanError, match=r"takes 3 inputs \(tokens, weight, keep\), got 1"):
        session(tokens)
    with pytest.raises(PlanError, match="takes tokens, weight, keep; got tokens, mask"):
        session.run({"tokens": tokens, "mask": keep})


def test_closing_removes_the_unpacked_code(
    perceptron_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with Session(perceptron_plan.path) as session:
        session(torch.randn(1, 6))
        (unpacked,) = tmp_path.iterdir()
        assert unpacked.stat().st_mode & 0o077 == 0
    with pytest.raises(PlanError, match="session is closed"):
        session(torch.randn(1, 6))
    assert not list(tmp_path.iterdir())


def test_the_end_of_the_process_removes_the_unpacked_code(perceptron_plan: Plan, tmp_path: Path) -> None:
    program = (
        "import sys, torch\nfrom planmill.engine import Session\nsession = Session(sys.argv[1])\n"
        "session(torch.randn(1, 6))\nraise SystemExit(3)"
    )
    arguments = [sys.executable, "-c", program, str(perceptron_plan.path)]
    assert subprocess.run(arguments, env={**os.environ, "TMPDIR": str(tmp_path)}, check=False).returncode == 3
    assert not list(tmp_path.iterdir())


class Door:
    """An op that tells when a thread is inside and waits until it is let out."""

    def __init__(self) -> None:
        self.inside: Callable[[], object] = lambda: None  # what else happens during the call
        self.entered, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.entered.set()
        assert self.opened.wait(20)
        self.inside()
        return x + 1


@pytest.fixture(scope="module")
def door_plan(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Door]]:
    """A model that goes through a Door and returns its input and views of one tensor."""

    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            y = x.sin()
            z = torch.ops.planmill_test.door(x)
            return {"same": x, "part": x[:, 1:], "sine": y, "turned": y.T, "next": z}

    path, door = tmp_path_factory.mktemp("door") / "door.plan", Door()
    with torch.library._scoped_library("planmill_test", "FRAGMENT") as library:
        library.define("door(Tensor x) -> Tensor")
        library.impl("door", door, "CPU")
        library.impl("door", torch.empty_like, "Meta")
        build(Views().eval(), torch.randn(2, 4), path, dynamic=DynamicDim("batch", 1, 2, 8))
        yield path, door


def test_outputs_share_no_memory(door_plan: tuple[Path, Door]) -> None:
    session, x = Session(door_plan[0]), torch.randn(3, 4)
    before = x.clone()
    for outputs in (list(session.run(x).values()), session.allocate_outputs(x)):
        wanted = [before, before[:, 1:], before.sin(), before.sin().T, before + 1]
        for output, value in zip(outputs, wanted, strict=True):
            torch.testing.assert_close(output, value)
            output.fill_(7.0)  # changes no output after it
        assert torch.equal(x, before)


def test_other_threads_run_during_a_call(door_plan: tuple[Path, Door]) -> None:
    path, door = door_plan
    session, results = Session(path), []
    door.entered.clear()
    door.opened.clear()
    caller = threading.Thread(target=lambda: results.append(session.run(torch.ones(2, 4))["next"]))
    caller.start()
    assert door.entered.wait(20)
    closer = threading.Thread(target=session.close)  # waits for the call under way
    closer.start()
    assert not results
    door.opened.set()
    caller.join()
    closer.join()
    assert torch.equal(results[0], torch.full((2, 4), 2.0))
    with pytest.raises(PlanError, match="session is closed"):
        session(torch.ones(2, 4))


def test_large_buffers_stay_from_one_call_to_the_next(door_plan: tuple[Path, Door]) -> None:
    path, door = door_plan
    session, x, size = Session(path), torch.ones(2, 4), 1 << 20
    runner: Any = session._run

    def during_a_call(do: Callable[[], torch.Tensor]) -> torch.Tensor:
        made = []
        door.opened.set()
        door.inside = lambda: made.append(do())
        try:
            session(x)
        finally:
            door.inside = lambda: None
        return made.pop()

    during_a_call(lambda: torch.empty(size))  # freed after the call
    assert runner.kept_bytes == 4 * size
    first = during_a_call(lambda: torch.zeros(size))
    second = during_a_call(lambda: torch.ones(size))  # the caller has the first one
    address, held = first.data_ptr(), 4 * size
    assert address != second.data_ptr()
    assert not first.any()
    assert runner.kept_bytes == 0
    del first
    assert runner.kept_bytes == held
    outside, small = torch.empty(size), during_a_call(lambda: torch.empty(size // 4))
    assert address not in (outside.data_ptr(), small.data_ptr())  # another's, or twice as large as needed
    again = during_a_call(lambda: torch.empty(size - 7))
    assert again.data_ptr() == address
    # oneDNN takes its scratch memory by the address alone
    image, weight = torch.ones(1, 64, 60, 60), torch.ones(64, 64, 3, 3)
    assert during_a_call(lambda: torch.conv2d(image, weight)).eq(64 * 9).all()
    del again
    assert runner.kept_bytes >= held
    for _ in range(6):
        session(x)
    assert runner.kept_bytes == 0
    del runner
    session.close()
    assert second.all()


def test_buffers_of_a_call_share_one_block(door_plan: tuple[Path, Door]) -> None:
    path, door = door_plan
    session, draws = Session(path), random.Random(0)
    runner: Any = session._run
    scripts = [_draw_script(draws) for _ in range(3)]

    def run(script: list[tuple[str, int, int]], late: Set[int]) -> dict[int, torch.Tensor]:
        """Buffers full of their own number; those in `late` go later than the script says. What is left at the end."""
        made: dict[int, torch.Tensor] = {}
        for kind, index, size in script:
            if kind == "take":
                made[index] = torch.full((size,), index, dtype=torch.int32)
            elif index not in late:
                assert bool((made.pop(index) == index).all())
        return made

    def call(script: list[tuple[str, int, int]], late: Set[int] = frozenset()) -> dict[int, torch.Tensor]:
        kept = []
        door.inside = lambda: kept.append(run(script, late))
        try:
            session(torch.ones(2, 4))
        finally:
            door.inside = lambda: None
        return kept.pop()

    held: list[dict[int, torch.Tensor]] = []
    for round_ in range(12):
        script = scripts[draws.randrange(3)]
        ended = [index for kind, index, _ in script if kind == "let go"]
        held.append(call(script, set(draws.sample(ended, 3)) if round_ % 2 else set()))
        if draws.random() < 0.5:
            held.pop(draws.randrange(len(held)))
        assert all(bool((x == index).all()) for made in held for index, x in made.items())
    held.clear()
    for _ in range(5):
        session(torch.ones(2, 4))
    assert runner.kept_bytes == 0
    for first in (17, 18, 19):  # calls of another kind begin with another size
        script = [("take", 40, first << 16), *_draw_script(draws, lasting=False), ("let go", 40, 0)]
        for _ in range(2):
            call(script)
        sizes = {index: size for kind, index, size in script if kind == "take"}
        changes = [4 * sizes[index] * (1 if kind == "take" else -1) for kind, index, _ in script]
        most = max(itertools.accumulate(changes))
        assert most <= runner.kept_bytes <= 1.2 * most
        for _ in range(5):
            session(torch.ones(2, 4))


def _draw_script(draws: random.Random, lasting: bool = True) -> list[tuple[str, int, int]]:
    """40 buffers of 256 KiB to 4 MiB, taken and let go in any order; where `lasting`, some outlive the call."""
    script, alive = [], []
    for index in range(40):
        script.append(("take", index, (1 << 16) * draws.randint(1, 16)))
        alive.append(index)
        while alive and draws.random() < 0.47:
            script.append(("let go", alive.pop(draws.randrange(len(alive))), 0))
    return script if lasting else script + [("let go", index, 0) for index in alive]


def test_filling_outputs(several_plan: Plan) -> None:
    session = Session(several_plan.path)
    inputs = (torch.randint(0, 11, (3, 5)), torch.randn(3), torch.rand(3, 5) < 0.5)
    wanted = session(*inputs)
    outputs = session.allocate_outputs(*inputs)
    for output in outputs:
        output.zero_()
    outputs[0] = torch.zeros(4, 3).T  # any strides
    got = session(*inputs, outputs=outputs)
    assert isinstance(got, tuple)
    assert all(a is b for a, b in zip(got, outputs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_outputs_that_do_not_fit(perceptron_plan: Plan) -> None:
    session, x = Session(perceptron_plan.path), torch.randn(2, 6)
    for outputs, message in (
        ([], "the plan has 1 outputs, got 0 tensors"),
        ([torch.zeros(2, 3, dtype=torch.float64)], r"output output: expected float32 \(batch, 3\), got float64"),
        ([torch.zeros(3, 3)], r"got float32 \(3, 3\): with these inputs it is \(2, 3\)"),
        ([torch.zeros(2, 3, requires_grad=True)], "requires a gradient"),
    ):
        with pytest.raises(PlanError, match=message):
            session(x, outputs=outputs)
    with pytest.raises(PlanError, match=r"input x: .* batch must be 1 to 9"):
        session.check(torch.zeros(10, 6))


def test_profile(convolutional_plan: Plan, tmp_path: Path) -> None:
    session, x = Session(convolutional_plan.path), torch.randn(2, 3, 8, 8)
    profile = session.profile(x, repeat=3, trace=tmp_path / "trace.json")
    assert [row.name for row in profile.stages] == ["check inputs", "payload", "own outputs"]
    assert all(row.count == 1 and row.time_ms > 0 for row in profile.stages)
    assert sum(row.share for row in profile.stages) == pytest.approx(1)
    assert sum(row.time_ms for row in profile.stages) == pytest.approx(profile.time_ms)
    assert sum(row.time_ms for row in profile.kernels) <= profile.stages[1].time_ms
    assert "payload" in str(profile)
    names = [event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert names.count("planmill: payload") == 3
    with pytest.raises(PlanError, match="repeat must be positive"):
        session.profile(x, repeat=0)
    with pytest.raises(PlanError, match=r"a trace is a \.json file"):
        session.profile(x, trace=tmp_path / "missing" / "trace.json")


def test_cuda_graphs_are_for_a_gpu(perceptron_plan: Plan) -> None:
    with pytest.raises(PlanError, match="cuda_graphs: this plan of target aoti runs on the CPU"):
        Session(perceptron_plan.path, cuda_graphs=True)
