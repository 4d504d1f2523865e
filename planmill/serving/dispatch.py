"""The bounded queue between HTTP and the workers, and the batches made from it."""

import asyncio
import contextlib
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from planmill.serving.worker import Request, Response, refusal

Answer = Callable[[Sequence[Request]], Awaitable[list[Response]]]


@dataclass(frozen=True)
class Limits:
    """What the server accepts, and how it makes batches.

    Args:
        max_batch: requests in a batch at most.
        max_wait_ms: how long the first request of a batch waits for others while a worker is free.
        max_pending: requests that were read and wait or run; more get a 429.
        max_pending_bytes: of bodies, as far as they were read; more get a 429.
        max_body: bytes of one body; more get a 413.
        timeout_s: of reading a body, and of an answer.
        max_connections: open at once; one more takes the place of the one that has waited longest for its client.
        slots: batches that are under way at once: two per worker, so that one is decoded while another is computed.
    """

    max_batch: int = 32
    max_wait_ms: float = 1.0
    max_pending: int = 256
    max_pending_bytes: int = 256 << 20
    max_body: int = 16 << 20
    timeout_s: float = 60.0
    max_connections: int = 1024
    slots: int = 2


@dataclass
class _Waiting:
    request: Request
    answer: "asyncio.Future[Response]"
    arrived: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Dispatcher:
    """Batches what waits whenever a slot is free: the busier the workers, the larger the batches.

    Args:
        answer: answers a batch; what it raises means that the worker is lost, and its requests get a 503.
        limits: see there.
        on_batch: called with the size of each batch.
    """

    def __init__(self, answer: Answer, limits: Limits, on_batch: Callable[[int], None] = lambda size: None) -> None:
        self._answer, self._limits, self._on_batch = answer, limits, on_batch
        self._queue: deque[_Waiting] = deque()
        self._arrival = asyncio.Event()
        self._slots = asyncio.Semaphore(limits.slots)
        self._running: set[asyncio.Task] = set()
        self._task = asyncio.get_running_loop().create_task(self._work())

    async def submit(self, request: Request) -> Response:
        """The answer to a request; a 503 where its worker was lost or takes too long."""
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._arrival.set()
        try:
            return await asyncio.wait_for(waiting.answer, self._limits.timeout_s)
        except TimeoutError:
            return refusal(503, f"no answer within {self._limits.timeout_s:g} s: try again later")

    async def close(self) -> None:
        """Stop, once what runs has ended."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task
        if self._running:
            await asyncio.wait(self._running)

    async def _work(self) -> None:
        while True:
            await self._slots.acquire()
            batch: list[_Waiting] = []
            try:
                while not batch:  # all that waited may have given up
                    batch = await self._next()
            finally:
                if not batch:
                    self._slots.release()
            task = asyncio.get_running_loop().create_task(self._run(batch))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _next(self) -> list[_Waiting]:
        limits, loop = self._limits, asyncio.get_running_loop()
        while not self._queue:
            await self._wait(None)
        deadline = self._queue[0].arrived + limits.max_wait_ms / 1e3
        while len(self._queue) < limits.max_batch and (left := deadline - loop.time()) > 0:
            await self._wait(left)
        taken = [self._queue.popleft() for _ in range(min(len(self._queue), limits.max_batch))]
        return [waiting for waiting in taken if not waiting.answer.done()]

    async def _wait(self, seconds: float | None) -> None:
        """Until a request arrives, or the time is over."""
        self._arrival.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._arrival.wait(), seconds)

    async def _run(self, batch: list[_Waiting]) -> None:
        self._on_batch(len(batch))
        answers: list[Response]
        try:
            requests = [waiting.request for waiting in batch]
            answers = await asyncio.wait_for(self._answer(requests), self._limits.timeout_s)
        except Exception as error:
            lost = f"the worker that had this request was lost ({type(error).__name__}): try again"
            answers = [refusal(503, lost)] * len(batch)
        finally:
            self._slots.release()
        for waiting, answer in zip(batch, answers, strict=True):
            if not waiting.answer.done():
                waiting.answer.set_result(answer)
