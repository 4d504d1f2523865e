"""The HTTP side: admission, limits, health and metrics. Nothing here knows Ray."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import Response as HttpResponse
from starlette.routing import Route

from planmill.serving.dispatch import Dispatcher, Limits
from planmill.serving.payloads import JSON, REQUESTS, RESPONSES, BadRequestError
from planmill.serving.worker import Request, Response, refusal


class Metrics:
    """What /metrics shows."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("planmill_requests", "Answers of /predict by status", ["status"], registry=registry)
        self.seconds = Histogram(
            "planmill_request_seconds",
            "From a request's head to its answer",
            buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60),
            registry=registry,
        )
        self.batches = Histogram(
            "planmill_batch_requests", "Requests in a batch", buckets=(1, 2, 4, 8, 16, 32, 64, 128), registry=registry
        )
        self.pending = Gauge("planmill_pending_requests", "Requests being read, waiting or running", registry=registry)
        self.pending_bytes = Gauge("planmill_pending_bytes", "Bytes held of their bodies", registry=registry)
        self.workers = Gauge("planmill_workers", "Workers that run", registry=registry)


class Workers(Protocol):
    """What answers batches."""

    @property
    def workers(self) -> int:
        """How many there are."""

    async def __aenter__(self) -> Any: ...

    async def __aexit__(self, *ended: Any) -> Any: ...

    async def answer(self, requests: Sequence[Request]) -> list[Response]:
        """Answer a batch; raises where the worker was lost."""


class Gateway:
    """The routes, and the admission to the queue behind them.

    Args:
        workers: answer batches; entered and left with the server.
        describe: what GET / shows.
        limits: see there.
    """

    def __init__(self, workers: Workers, describe: dict[str, Any], limits: Limits) -> None:
        self._workers, self._describe, self._limits = workers, describe, limits
        self.metrics = Metrics()
        self.metrics.workers.set_function(lambda: workers.workers)
        self._pending = self._read = self._pending_bytes = 0
        self._dispatcher: Dispatcher | None = None
        self.app = Starlette(
            routes=[
                Route("/predict", self._predict, methods=["POST"]),
                Route("/health", self._health),
                Route("/metrics", self._show_metrics),
                Route("/", self._show_plan),
            ],
            lifespan=self._lifespan,
            exception_handlers={HTTPException: _say},
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        async with self._workers:
            self._dispatcher = Dispatcher(self._workers.answer, self._limits, self.metrics.batches.observe)
            yield
            await self._dispatcher.close()

    async def _predict(self, request: HttpRequest) -> HttpResponse:
        started = time.perf_counter()
        try:
            kind, wanted, size = self._read_head(request)
            status, media, content = await self._admit(request, kind, wanted, size)
        except BadRequestError as error:
            status, media, content = refusal(error.status, error.message)
        self.metrics.requests.labels(str(status)).inc()
        self.metrics.seconds.observe(time.perf_counter() - started)
        headers = {"Retry-After": "1"} if status in (429, 503) else {}
        if status in (408, 413, 429):
            headers["Connection"] = "close"  # the rest of the body is not read
        return HttpResponse(content, status, headers, media)

    def _read_head(self, request: HttpRequest) -> tuple[str, str, int]:
        """Content type, type of the answer, and the bytes that the body may have."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind not in REQUESTS:
            raise BadRequestError(415, f"the content type must be one of {', '.join(REQUESTS)}")
        length = request.headers.get("content-length", "")
        size = int(length) if length.isdecimal() else self._limits.max_body
        if size > self._limits.max_body:
            raise BadRequestError(413, f"the body has {size} bytes; at most {self._limits.max_body} are read")
        return kind, _choose_answer(request.headers.get("accept", "")), size

    async def _admit(self, request: HttpRequest, kind: str, wanted: str, size: int) -> Response:
        """Count what has arrived, never what was announced: whoever sends nothing takes nothing from the others."""
        self._must_fit(size)
        parts: list[bytes] = []
        self._hold(1, 0)
        try:
            await self._read_body(request, parts)
            self._must_fit(0)
            self._read += 1
            try:
                assert self._dispatcher is not None
                return await self._dispatcher.submit((b"".join(parts), kind, wanted))
            finally:
                self._read -= 1
        finally:
            self._hold(-1, -sum(map(len, parts)))

    def _must_fit(self, size: int) -> None:
        """Refuse a request where the queue is full, or will be with so many bytes more."""
        limits = self._limits
        if self._read >= limits.max_pending or self._pending_bytes + size > limits.max_pending_bytes:
            raise BadRequestError(429, f"{self._read} requests wait already: try again later")

    def _hold(self, requests: int, size: int) -> None:
        self._pending += requests
        self._pending_bytes += size
        self.metrics.pending.set(self._pending)
        self.metrics.pending_bytes.set(self._pending_bytes)

    async def _read_body(self, request: HttpRequest, parts: list[bytes]) -> None:
        size = 0
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                async for part in request.stream():
                    size += len(part)
                    if size > self._limits.max_body:
                        raise BadRequestError(413, f"the body is longer than {self._limits.max_body} bytes")
                    self._must_fit(len(part))
                    self._hold(0, len(part))
                    parts.append(part)
        except TimeoutError:
            raise BadRequestError(408, f"the body did not arrive within {self._limits.timeout_s:g} s") from None
        except ClientDisconnect:
            raise BadRequestError(400, "the body was cut short") from None

    async def _health(self, request: HttpRequest) -> HttpResponse:
        if self._workers.workers:
            return _json(200, {"status": "ok", "workers": self._workers.workers})
        return _json(503, {"status": "no worker runs", "workers": 0})

    async def _show_metrics(self, request: HttpRequest) -> HttpResponse:
        return HttpResponse(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def _show_plan(self, request: HttpRequest) -> HttpResponse:
        return _json(200, self._describe)


def _choose_answer(accept: str) -> str:
    """The first type of an Accept header that there is; JSON where the sender does not mind."""
    wanted = [part.partition(";")[0].strip().lower() for part in accept.split(",") if part.strip()]
    for kind in wanted:
        if kind in RESPONSES:
            return kind
        if kind in ("*/*", "application/*"):
            return JSON
    if wanted:
        raise BadRequestError(406, f"the answer is one of {', '.join(RESPONSES)}")
    return JSON


async def _say(request: HttpRequest, error: Exception) -> HttpResponse:
    assert isinstance(error, HTTPException)
    return _json(
        error.status_code, {"error": f"{request.method} {request.url.path[:200]}: {error.detail}"}, error.headers
    )


def _json(status: int, content: Any, headers: Any = None) -> HttpResponse:
    return HttpResponse(json.dumps(content), status, headers, JSON)
