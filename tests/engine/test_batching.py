"""Callers that share calls get what the plan computes at that batch, their own errors, and a bounded queue."""

import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from torch import nn

from planmill.engine import MicroBatcher, Plan, PlanError, QueueFullError, Session


class Gate:
    """A session whose calls wait for `opened`, and that remembers what it was called with."""

    def __init__(self, session: Session, fails: float | None = None) -> None:
        self.session, self.plan, self.check, self.fails = session, session.plan, session.check, fails
        self.entered, self.opened = threading.Event(), threading.Event()
        self.calls: list[tuple[torch.Tensor, ...]] = []
        self.results: list[Any] = []

    def __call__(self, *inputs: torch.Tensor) -> Any:
        self.entered.set()
        assert self.opened.wait(20)
        self.calls.append(inputs)
        if self.fails is not None and bool((inputs[0] == self.fails).any()):
            raise RuntimeError("a value that the model cannot take")
        self.results.append(self.session(*inputs))
        return self.results[-1]


def held(gate: Gate, requests: Sequence[torch.Tensor], **options: Any) -> tuple[MicroBatcher, list[Future]]:
    """A batcher with one request in a call that waits, and `requests` in its queue."""
    batcher = MicroBatcher(gate, **options)  # type: ignore[arg-type]
    futures = [batcher.submit(torch.zeros(1, *requests[0].shape[1:]))]
    assert gate.entered.wait(20)
    return batcher, futures + [batcher.submit(x) for x in requests]


def test_what_waits_shares_a_call(perceptron: nn.Module, perceptron_plan: Plan) -> None:
    gate = Gate(Session(perceptron_plan.path))
    requests = [torch.randn(rows, 6) for rows in (1, 3, 2, 2, 5, 4, 1)]
    batcher, futures = held(gate, requests, max_batch=8, max_wait_ms=0)
    gate.opened.set()
    batcher.close()
    assert [len(inputs[0]) for inputs in gate.calls] == [1, 8, 5, 5]  # 1+3+2+2, 5, 4+1
    combined = torch.cat([result for result in gate.results[1:]])
    got = [future.result(0)[0] for future in futures[1:]]
    assert torch.equal(torch.cat(got), combined)  # bit for bit
    assert [len(x) for x in got] == [1, 3, 2, 2, 5, 4, 1]
    assert len({x.untyped_storage().data_ptr() for x in got}) == len(got)
    with torch.no_grad():
        torch.testing.assert_close(torch.cat(got), perceptron(torch.cat(requests)), atol=1e-6, rtol=1e-5)


def test_only_equal_shapes_share_a_call(convolutional: nn.Module, convolutional_plan: Plan) -> None:
    gate = Gate(Session(convolutional_plan.path))
    requests = [torch.randn(1, 3, side, 8) for side in (8, 9, 8, 9, 9)]
    batcher, futures = held(gate, requests, max_wait_ms=0)
    gate.opened.set()
    batcher.close()
    assert [tuple(inputs[0].shape) for inputs in gate.calls[1:]] == [(2, 3, 8, 8), (3, 3, 9, 8)]
    with torch.no_grad():
        for x, future in zip(requests, futures[1:], strict=True):
            torch.testing.assert_close(future.result(0)[0], convolutional(x), atol=1e-5, rtol=1e-5)


def test_many_threads(several: nn.Module, several_plan: Plan) -> None:
    generator = torch.Generator().manual_seed(0)
    cases = [
        (
            torch.randint(0, 11, (1 + i % 5, 5), generator=generator),
            torch.randn(1 + i % 5, generator=generator),
            torch.rand(1 + i % 5, 5, generator=generator) < 0.5,
        )
        for i in range(48)
    ]
    got: dict[int, Any] = {}
    with MicroBatcher(Session(several_plan.path), max_batch=16, max_wait_ms=2) as batcher:

        def work(start: int) -> None:
            for i in range(start, len(cases), 6):
                got[i] = batcher(*cases[i])

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for i, case in enumerate(cases):
        wanted = [value.detach() for value in several(*case).values() if value is not None]
        for a, b in zip(got[i], wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_an_error_goes_to_the_caller_it_belongs_to(perceptron_plan: Plan) -> None:
    gate = Gate(Session(perceptron_plan.path), fails=13.0)
    requests = [torch.randn(2, 6), torch.full((1, 6), 13.0), torch.randn(3, 6)]
    batcher, futures = held(gate, requests, max_wait_ms=0)
    gate.opened.set()
    batcher.close()
    with pytest.raises(RuntimeError, match="cannot take"):
        futures[2].result(0)
    assert [len(futures[i].result(0)[0]) for i in (0, 1, 3)] == [1, 2, 3]
    with (
        MicroBatcher(gate.session) as batcher,
        pytest.raises(PlanError, match=r"input x: expected float32 \(batch, 6\)"),
    ):
        batcher(torch.zeros(1, 7))


def test_the_queue_is_bounded(perceptron_plan: Plan) -> None:
    gate = Gate(Session(perceptron_plan.path))
    batcher, futures = held(gate, [torch.zeros(1, 6)] * 3, max_queue=3, max_wait_ms=0)
    with pytest.raises(QueueFullError, match="3 requests wait already"):
        batcher.submit(torch.zeros(1, 6))
    assert futures[2].cancel()
    gate.opened.set()
    batcher.close()
    assert futures[2].cancelled()
    assert [len(futures[i].result(0)[0]) for i in (0, 1, 3)] == [1, 1, 1]
    assert len(gate.calls[1][0]) == 2
    with pytest.raises(PlanError, match="the batcher is closed"):
        batcher.submit(torch.zeros(1, 6))


def test_a_lone_request_does_not_wait_for_ever(perceptron_plan: Plan) -> None:
    session, x = Session(perceptron_plan.path), torch.randn(2, 6)
    with MicroBatcher(session, max_wait_ms=5) as batcher:
        assert torch.equal(batcher(x), session(x))  # type: ignore[arg-type]


def test_what_cannot_be_batched(perceptron_plan: Plan, forge: Any) -> None:
    session = Session(perceptron_plan.path)
    for options, message in (
        ({"max_batch": 10}, "max_batch must be 1 to 9, the plan's largest, got 10"),
        ({"max_batch": 0}, "max_batch must be 1 to 9"),
        ({"max_wait_ms": -1.0}, "max_wait_ms must be 0 to 60000"),
        ({"max_wait_ms": float("nan")}, "max_wait_ms must be"),
        ({"max_queue": 0}, "max_queue must be positive"),
    ):
        with pytest.raises(PlanError, match=message):
            MicroBatcher(session, **options)
    with (
        MicroBatcher(session, max_batch=2) as batcher,
        pytest.raises(PlanError, match="at most max_batch 2 samples, got 3"),
    ):
        batcher(torch.zeros(3, 6))
    fixed = perceptron_plan.manifest.outputs[0].model_copy(update={"shape": [9, 3]})
    with pytest.raises(PlanError, match=r"samples cannot share a call: output is float32 \(9, 3\)"):
        MicroBatcher(Session(forge(outputs=[fixed])))
