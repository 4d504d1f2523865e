"""Concurrent callers share calls of a session: the samples that wait are run together."""

import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from types import TracebackType

import torch

from planmill.engine.errors import PlanError
from planmill.engine.plan import Plan
from planmill.engine.session import Session

Inputs = Sequence[torch.Tensor]
Outputs = tuple[torch.Tensor, ...]


class QueueFullError(PlanError):
    """More requests wait than the batcher was told to hold; try again later."""


@dataclass
class _Request:
    inputs: Inputs
    rows: int
    future: "Future[Outputs]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


def find_batch(plan: Plan) -> tuple[str, int]:
    """The dynamic dimension that stands first in every input and output of a plan, and its largest size.

    Raises:
        PlanError: there is none.
    """
    manifest = plan.manifest
    specs = [*manifest.inputs, *manifest.outputs]
    name = str(specs[0].shape[0]) if specs[0].shape else ""
    odd = next(
        (spec for spec in specs if not spec.shape or spec.shape[0] != name or name not in manifest.dynamic), None
    )
    if odd is not None:
        raise PlanError(
            f"{plan.path}: samples cannot share a call: {odd.name} is {odd}, and batching needs one dynamic dimension "
            "that comes first in every input and output: build the plan with a range of batch sizes"
        )
    return name, manifest.dynamic[name].maximum


class MicroBatcher:
    """Runs the requests of concurrent callers together.

    A request is the plan's inputs for one sample or several. What waits when the session becomes free is run in one
    call, up to `max_batch` samples of one shape, oldest first; a lone request waits `max_wait_ms` for company. A result
    is bit for bit what the plan computes at the batch that the request became part of. Calls use as many threads as
    torch had when the batcher was made.

    Args:
        session: of a plan whose inputs and outputs share a dynamic first dimension; it stays the caller's to close.
        max_batch: samples in a call at most; None: the largest batch of the plan.
        max_wait_ms: how long the first request of a batch waits for others.
        max_queue: requests that may wait; more are refused.

    Raises:
        PlanError: the plan has no such dimension, or an argument is out of range.
    """

    def __init__(
        self, session: Session, *, max_batch: int | None = None, max_wait_ms: float = 1.0, max_queue: int = 1024
    ) -> None:
        _, largest = find_batch(session.plan)
        if max_batch is not None and not 1 <= max_batch <= largest:
            raise PlanError(f"max_batch must be 1 to {largest}, the plan's largest, got {max_batch}")
        if not 0 <= max_wait_ms <= 60_000:
            raise PlanError(f"max_wait_ms must be 0 to 60000, got {max_wait_ms}")
        if max_queue < 1:
            raise PlanError(f"max_queue must be positive, got {max_queue}")
        self.session, self.max_batch = session, max_batch or largest
        self._max_wait_s, self._max_queue = max_wait_ms / 1e3, max_queue
        self._queue: deque[_Request] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._threads = torch.get_num_threads()
        self._thread = threading.Thread(target=self._work, name="planmill batches", daemon=True)
        self._thread.start()

    def submit(self, *inputs: torch.Tensor) -> "Future[Outputs]":
        """Ask for a run; the future gives the outputs, as a tuple, or the error.

        The inputs must not be changed before it is done.

        Raises:
            PlanError: an input does not fit, has more than `max_batch` samples, or the batcher is closed.
            QueueFullError: `max_queue` requests wait already.
        """
        self.session.check(*inputs)
        request = _Request(inputs, inputs[0].shape[0])
        if request.rows > self.max_batch:
            raise PlanError(f"a request has at most max_batch {self.max_batch} samples, got {request.rows}")
        with self._changed:
            if self._closed:
                raise PlanError("the batcher is closed")
            if len(self._queue) >= self._max_queue:
                raise QueueFullError(f"{len(self._queue)} requests wait already, and max_queue is {self._max_queue}")
            self._queue.append(request)
            self._changed.notify_all()
        return request.future

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run the plan as `Session.__call__` does, together with what else waits."""
        outputs = self.submit(*inputs).result()
        return outputs[0] if len(outputs) == 1 else outputs

    def close(self) -> None:
        """Refuse new requests, finish those accepted, and stop."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def __enter__(self) -> "MicroBatcher":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _work(self) -> None:
        torch.set_num_threads(self._threads)  # OpenMP keeps it per calling thread
        while batch := self._next():
            self._serve([request for request in batch if request.future.set_running_or_notify_cancel()])

    def _next(self) -> list[_Request]:
        """The next batch, once it is full or its oldest request has waited long enough; empty at the end."""
        with self._changed:
            while not self._queue and not self._closed:
                self._changed.wait()
            if not self._queue:
                return []
            deadline = self._queue[0].arrived + self._max_wait_s
            chosen, full = self._choose()
            while not full and not self._closed and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
                chosen, full = self._choose()
            leaving = {id(request) for request in chosen}
            self._queue = deque(request for request in self._queue if id(request) not in leaving)
            return chosen

    def _choose(self) -> tuple[list[_Request], bool]:
        """The oldest request and, in order, what fits beside it; and whether waiting could add nothing."""
        first = sample_shapes(self._queue[0].inputs)
        chosen: list[_Request] = []
        rows = 0
        for request in self._queue:
            if sample_shapes(request.inputs) != first:
                continue
            if rows + request.rows > self.max_batch:
                return chosen, True
            chosen.append(request)
            rows += request.rows
        return chosen, rows == self.max_batch

    def _serve(self, batch: list[_Request]) -> None:
        results = run_together(self.session, [request.inputs for request in batch])
        for request, outputs in zip(batch, results, strict=True):
            if isinstance(outputs, Exception):
                request.future.set_exception(outputs)
            else:
                request.future.set_result(outputs)


def run_together(session: Session, requests: Sequence[Inputs]) -> list[Outputs | Exception]:
    """One call of the session for requests of one shape, which together fit its plan.

    Returns:
        The outputs of each request, in memory of their own. Where the call fails each request is run alone, and those
        that fail again get their error.
    """
    try:
        if len(requests) == 1:
            return [_as_tuple(session(*requests[0]))]
        if not requests:
            return []
        with torch.no_grad():
            outputs = _as_tuple(session(*(torch.cat(column) for column in zip(*requests, strict=True))))
    except Exception as error:
        if len(requests) == 1:
            return [error]
        return [result for request in requests for result in run_together(session, [request])]
    rows = [inputs[0].shape[0] for inputs in requests]
    parts = [[part.clone() for part in output.split(rows)] for output in outputs]
    return list(zip(*parts, strict=True))


def plan_groups(requests: Mapping[int, Inputs], largest: int) -> list[list[int]]:
    """Which requests share a call, by their keys: those of equal shapes, in order, with `largest` samples at most.

    With `largest` 0 each request is a call of its own.
    """
    groups: list[list[int]] = []
    last: dict[tuple[torch.Size, ...], tuple[list[int], int]] = {}
    for key, inputs in requests.items():
        rows = inputs[0].shape[0] if largest else 0
        shapes = sample_shapes(inputs)
        group, filled = last.get(shapes, ([], 0))
        if not group or not largest or filled + rows > largest:
            group, filled = [], 0
            groups.append(group)
        group.append(key)
        last[shapes] = group, filled + rows
    return groups


def sample_shapes(inputs: Inputs) -> tuple[torch.Size, ...]:
    """The shapes of one sample: requests for which they are equal can share a call."""
    return tuple(x.shape[1:] for x in inputs)


def _as_tuple(outputs: torch.Tensor | Outputs) -> Outputs:
    return outputs if isinstance(outputs, tuple) else (outputs,)
