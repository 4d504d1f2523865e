"""A TensorRT plan's runner, on a stand-in for the library that computes on the CPU through raw addresses.

The stand-in keeps the library's contract: shapes before addresses, nothing allocated for the caller, one context's
memory at a time. What only a GPU shows (streams, graphs, the library itself) is not tested here: see docs/tensorrt.md.
"""

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from planmill.engine import PlanError
from planmill.engine.graphs import Device
from planmill.engine.plugins.memory import view_memory
from planmill.engine.targets import OnDevice
from planmill.engine.tensorrt.session import EngineRunner

HOST = torch.device("cpu")


class Context:
    def __init__(self, engine: "Engine") -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.reshaped = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        self.reshaped += 1
        return shape[0] <= 4

    def infer_shapes(self) -> list[str]:
        return []

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        rows, columns = self.shapes["x"]
        return {"product": (rows, columns), "total": (rows,)}[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        x, scale = (view_memory(self.addresses[n], self.shapes[n], torch.float32, HOST) for n in ("x", "scale"))
        shapes = {n: self.get_tensor_shape(n) for n in ("product", "total")}
        view_memory(self.addresses["product"], shapes["product"], torch.float32, HOST).copy_(x * scale)
        view_memory(self.addresses["total"], shapes["total"], torch.int32, HOST).copy_((x * scale).sum(1))
        self.engine.runs += 1
        return self.engine.healthy


class Engine:
    """x [rows, columns] and scale [1] -> total int32 [rows] and product [rows, columns], in an order of its own."""

    names = ("total", "scale", "product", "x")
    num_io_tensors = 4

    def __init__(self) -> None:
        self.runs, self.healthy, self.contexts = 0, True, 0

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        return SimpleNamespace(name="INPUT" if name in ("x", "scale") else "OUTPUT")

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name="INT32" if name == "total" else "FLOAT")

    def create_execution_context(self) -> Context:
        self.contexts += 1
        return Context(self)


class Host(Device):
    def __init__(self) -> None:
        super().__init__(HOST)
        self.captures, self.turns = 0, 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield

    def stream(self) -> int:
        return 0

    def capture(self, run: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        run()
        return run


def runner(engine: Engine | None = None, device: Device | None = None) -> EngineRunner:
    return EngineRunner(engine or Engine(), ["x", "unused", "scale"], ["product", "total"], device or Host())


def inputs(rows: int, columns: int = 3) -> list[torch.Tensor]:
    return [torch.randint(-9, 9, (rows, columns)).float(), torch.zeros(5), torch.tensor([2.0])]


def assert_right(got: list[torch.Tensor], given: list[torch.Tensor]) -> None:
    product = given[0] * given[2]
    assert torch.equal(got[0], product)
    assert torch.equal(got[1], product.sum(1).int())


def test_a_part_of_a_tensor_is_aligned() -> None:
    engine, host = Engine(), Host()
    context = Context(engine)
    engine.create_execution_context = lambda: context  # type: ignore[method-assign]
    run = runner(engine, host)
    given = inputs(4)
    given[0] = given[0][1:]
    assert given[0].data_ptr() % 64
    assert_right(run(given), given)
    assert context.addresses["x"] % 64 == 0  # what torch gives on a CPU
    assert host.turns == 1


def test_inputs_and_outputs_go_by_name() -> None:
    run = runner()
    assert isinstance(run, OnDevice)
    for rows in (2, 2, 4, 1, 2):
        given = inputs(rows)
        assert_right(run(given), given)


def test_outputs_are_the_callers_own() -> None:
    run = runner()
    first_given, second_given = inputs(2), inputs(2)
    first = run(first_given)
    run(second_given)
    assert_right(first, first_given)


def test_shapes_are_set_when_they_change_only() -> None:
    engine = Engine()
    run = runner(engine)
    for _ in range(3):
        run(inputs(2))
    assert run._context.context.reshaped == 2
    run(inputs(3))
    assert run._context.context.reshaped == 4
    assert engine.contexts == 1


def test_an_empty_input_has_an_address() -> None:
    given = inputs(2, 0)
    got = runner()(given)
    assert got[0].shape == (2, 0)
    assert got[1].tolist() == [0, 0]


@pytest.mark.parametrize(
    "names",
    [(["x"], ["product", "total"]), (["x", "scale"], ["product"]), (["x", "scale", "product"], ["total"])],
    ids=["input", "output", "swapped"],
)
def test_another_payload_is_refused(names: tuple[list[str], list[str]]) -> None:
    with pytest.raises(PlanError, match="other inputs or outputs than the manifest"):
        EngineRunner(Engine(), *names, Host())


def test_a_refused_shape_leaves_the_runner_usable() -> None:
    run = runner()
    with pytest.raises(PlanError, match=r"input x: the TensorRT payload does not take \[5, 3\]"):
        run(inputs(5))
    given = inputs(4)
    assert_right(run(given), given)


def test_a_failed_run_is_an_error() -> None:
    engine = Engine()
    run = runner(engine)
    engine.healthy = False
    with pytest.raises(PlanError, match="could not run the plan"):
        run(inputs(2))


def test_graphs_are_captured_once_per_shape_and_replayed() -> None:
    engine, device = Engine(), Host()
    run = runner(engine, device)
    run.record_graphs()
    kept = []
    for rows in (2, 3, 2, 3, 2, 2, 3):
        given = inputs(rows)
        kept.append((run(given), given))
    for got, given in kept:  # a replay overwrites no result that was handed out
        assert_right(got, given)
    assert device.captures == 2
    assert engine.contexts == 3  # a graph's memory is not moved by another shape


def test_graphs_of_old_shapes_are_let_go() -> None:
    device = Host()
    run = runner(device=device)
    run.record_graphs()
    for _ in range(2):
        for columns in range(1, 12):
            given = inputs(2, columns)
            assert_right(run(given), given)
    assert device.captures == 11
    assert run._graphs is not None
    assert len(run._graphs) == 8
