"""Admission, limits and batches of the HTTP side, with a worker that the test holds in its hand."""

import asyncio
import contextlib
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from planmill.serving.dispatch import Limits
from planmill.serving.gateway import Gateway
from planmill.serving.payloads import JSON, NPY, SAFETENSORS
from planmill.serving.pool import CONNECTIONS, Pool, listen
from planmill.serving.protocol import Protocol
from planmill.serving.worker import Request, Response

HEAD = {"content-type": JSON}


class Hand:
    """A worker: echoes bodies once it is let go, and remembers its batches."""

    def __init__(self) -> None:
        self.open = asyncio.Event()
        self.batches: list[list[Request]] = []
        self.lost = 0
        self.workers = 2

    async def __aenter__(self) -> None: ...

    async def __aexit__(self, *ended: Any) -> None: ...

    async def answer(self, requests: Sequence[Request]) -> list[Response]:
        self.batches.append(list(requests))
        await self.open.wait()
        if self.lost:
            self.lost -= 1
            raise ConnectionError("gone")
        return [(200, wanted, body) for body, _, wanted in requests]


@asynccontextmanager
async def serving(hand: Hand, **limits: Any) -> AsyncIterator[tuple[httpx.AsyncClient, Gateway]]:
    gateway = Gateway(hand, {"model": "m"}, Limits(**limits))
    transport = httpx.ASGITransport(gateway.app)
    client = httpx.AsyncClient(transport=transport, base_url="http://test")
    async with gateway.app.router.lifespan_context(gateway.app), client:
        yield client, gateway


def scenario(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_heads_that_are_refused() -> None:
    async def test() -> None:
        async with serving(Hand(), max_body=100) as (client, _):
            for headers, content, status, message in (
                ({}, b"x", 415, "the content type must be one of application/json"),
                ({"content-type": "text/html"}, b"x", 415, "the content type"),
                ({**HEAD, "accept": "text/html, image/png"}, b"x", 406, "the answer is one of"),
                (HEAD, b"x" * 101, 413, "the body has 101 bytes; at most 100"),
            ):
                answer = await client.post("/predict", headers=headers, content=content)
                assert (answer.status_code, message in answer.json()["error"]) == (status, True)

            async def chunks() -> AsyncIterator[bytes]:  # without a length
                for _ in range(11):
                    yield b"x" * 10

            answer = await client.post("/predict", headers=HEAD, content=chunks())
            assert (answer.status_code, answer.headers["connection"]) == (413, "close")
            for path, method, status in (("/predict", "GET", 405), ("/nothing", "POST", 404)):
                answer = await client.request(method, path)
                assert answer.status_code == status
                assert answer.json()["error"].startswith(f"{method} {path}: ")

    scenario(test)


def test_types_of_the_answer() -> None:
    async def test() -> None:
        hand = Hand()
        hand.open.set()
        async with serving(hand) as (client, _):
            for accept, wanted in (
                (None, JSON),
                ("*/*", JSON),
                (f"text/html, {NPY};q=0.5, {JSON}", NPY),
                (SAFETENSORS.upper(), SAFETENSORS),
                ("", JSON),
            ):
                headers = HEAD if accept is None else {**HEAD, "accept": accept}
                answer = await client.post("/predict", headers=headers, content=b"body")
                assert (answer.status_code, answer.headers["content-type"], answer.content) == (200, wanted, b"body")

    scenario(test)


def test_what_waits_becomes_one_batch() -> None:
    async def test() -> None:
        hand = Hand()
        async with serving(hand, slots=1, max_batch=3, max_wait_ms=0) as (client, gateway):

            def post(i: int) -> asyncio.Task:
                return asyncio.create_task(client.post("/predict", headers=HEAD, content=b"%d" % i))

            first = post(0)
            await until(lambda: len(hand.batches) == 1)
            rest = [post(i) for i in range(1, 6)]
            await until(lambda: gateway.metrics.registry.get_sample_value("planmill_pending_requests") == 6)
            hand.open.set()
            answers = await asyncio.gather(first, *rest)
            assert [answer.content for answer in answers] == [b"%d" % i for i in range(6)]
            assert [len(batch) for batch in hand.batches] == [1, 3, 2]

    scenario(test)


def test_a_lone_request_waits_for_company() -> None:
    async def test() -> None:
        hand = Hand()
        hand.open.set()
        async with serving(hand, max_wait_ms=10_000, max_batch=2) as (client, _):
            posts = [client.post("/predict", headers=HEAD, content=b"x") for _ in range(2)]
            await asyncio.gather(*posts)
            assert [len(batch) for batch in hand.batches] == [2]

    scenario(test)


@pytest.mark.parametrize("limit", ["requests", "bytes"])
def test_a_full_queue_answers_429_and_empties_again(limit: str) -> None:
    limits = {"max_pending": 3} if limit == "requests" else {"max_pending_bytes": 30}

    async def test() -> None:
        hand = Hand()
        async with serving(hand, slots=1, **limits) as (client, gateway):
            posts = [
                asyncio.create_task(client.post("/predict", headers=HEAD, content=b"0123456789")) for _ in range(3)
            ]
            await until(lambda: gateway.metrics.registry.get_sample_value("planmill_pending_requests") == 3)
            refused = await client.post("/predict", headers=HEAD, content=b"0123456789")
            assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
            assert refused.json()["error"] == "3 requests wait already: try again later"
            assert (await client.get("/health")).status_code == 200
            hand.open.set()
            assert {(await post).status_code for post in posts} == {200}
            assert (await client.post("/predict", headers=HEAD, content=b"x")).status_code == 200
            text = (await client.get("/metrics")).text
            assert 'planmill_requests_total{status="200"} 4.0' in text
            assert 'planmill_requests_total{status="429"} 1.0' in text
            assert "planmill_pending_requests 0.0" in text
            assert "planmill_pending_bytes 0.0" in text

    scenario(test)


def test_a_lost_worker_costs_its_batch() -> None:
    async def test() -> None:
        hand = Hand()
        hand.lost = 1
        async with serving(hand, slots=1, max_batch=2, max_wait_ms=0) as (client, gateway):
            first = asyncio.create_task(client.post("/predict", headers=HEAD, content=b"0"))
            await until(lambda: len(hand.batches) == 1)
            rest = [asyncio.create_task(client.post("/predict", headers=HEAD, content=b"x")) for _ in range(3)]
            await until(lambda: gateway.metrics.registry.get_sample_value("planmill_pending_requests") == 4)
            hand.open.set()
            lost = await first
            assert (lost.status_code, lost.headers["retry-after"]) == (503, "1")
            assert "was lost (ConnectionError): try again" in lost.json()["error"]
            assert [(await post).status_code for post in rest] == [200] * 3

    scenario(test)


def test_no_answer_in_time() -> None:
    async def test() -> None:
        hand = Hand()
        async with serving(hand, timeout_s=0.05, slots=1) as (client, gateway):
            answer = await client.post("/predict", headers=HEAD, content=b"x")
            assert answer.status_code == 503
            assert gateway.metrics.registry.get_sample_value("planmill_pending_requests") == 0

            async def never() -> AsyncIterator[bytes]:
                yield b"x"
                await asyncio.Event().wait()

            slow = await client.post("/predict", headers=HEAD, content=never())
            assert (slow.status_code, slow.json()["error"]) == (408, "the body did not arrive within 0.05 s")

    scenario(test)


def test_the_end_finishes_what_was_accepted() -> None:
    async def test() -> None:
        hand = Hand()
        async with serving(hand, slots=1, max_wait_ms=0) as (client, _):
            post = asyncio.create_task(client.post("/predict", headers=HEAD, content=b"x"))
            await until(lambda: len(hand.batches) == 1)
            asyncio.get_running_loop().call_later(0.05, hand.open.set)
        assert (await post).status_code == 200

    scenario(test)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_pool_outlives_its_workers(tmp_path: Path) -> None:
    """One worker hangs up in the middle of an answer; one is gone before; then there is a new one."""

    def answer(requests: Sequence[Request]) -> list[Response]:
        if requests[0][0] == b"die":
            sys.exit()  # ends the thread, and its connection
        return [(200, kind, body) for body, kind, _ in requests]

    async def test() -> None:
        request = (b"x" * 300_000, JSON, JSON)
        gone = socket.socket(socket.AF_UNIX)
        gone.bind(str(tmp_path / "gone.sock"))
        gone.close()
        async with Pool(tmp_path) as pool:
            assert pool.workers == 0
            assert not list(tmp_path.iterdir())
            waiting = asyncio.create_task(pool.answer([request]))
            listen(tmp_path, answer)
            assert await waiting == [(200, JSON, request[0])]
            assert pool.workers == 1
            for _ in range(3):
                with pytest.raises(ConnectionError):
                    await pool.answer([(b"die", JSON, JSON)])
                both = await asyncio.gather(*(pool.answer([request] * n) for n in (2, 3)))
                assert [len(answers) for answers in both] == [2, 3]
            assert pool.workers == 1

    scenario(test)


def test_a_worker_that_ends_while_idle_is_not_counted(tmp_path: Path) -> None:
    async def test() -> None:
        connected: list[asyncio.StreamWriter] = []
        server = await asyncio.start_unix_server(lambda _, writer: connected.append(writer), tmp_path / "idle.sock")
        async with Pool(tmp_path) as pool:
            await until(lambda: pool.workers == 1 and len(connected) == CONNECTIONS)
            server.close()
            for writer in connected:
                writer.close()
            await until(lambda: pool.workers == 0)

    scenario(test)


def test_health_without_a_worker() -> None:
    async def test() -> None:
        hand = Hand()
        hand.workers = 0
        async with serving(hand) as (client, _):
            answer = await client.get("/health")
        assert (answer.status_code, answer.json()["status"]) == (503, "no worker runs")
        assert json.loads(answer.content)["workers"] == 0

    scenario(test)


@asynccontextmanager
async def listening(hand: Hand, caplog: pytest.LogCaptureFixture) -> AsyncIterator[tuple[int, set[Any]]]:
    """The port of a server and its connections, which may idle for a quarter of a second; nothing goes wrong in it."""
    gateway = Gateway(hand, {"model": "m"}, Limits())
    config = uvicorn.Config(
        gateway.app, port=0, log_config=None, http=Protocol, ws="none", h11_max_incomplete_event_size=16 << 10
    )
    config.timeout_keep_alive = 0.25  # type: ignore[assignment]
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign, assignment]
    task = asyncio.create_task(server.serve())
    await until(lambda: server.started)
    yield server.servers[0].sockets[0].getsockname()[1], server.server_state.connections
    server.should_exit = True
    await task
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


ANSWER = b"<an answer>"


async def exchange(port: int, sent: bytes) -> bytes:
    """What comes back until the server hangs up; at `ANSWER` there must have been one before more is sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    first, *rest = sent.split(ANSWER)
    writer.write(first)
    got = b""
    for part in rest:
        got += await reader.readuntil(b"}")
        writer.write(part)
    got += await reader.read()
    writer.close()
    return got


POST = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
GET = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.mark.parametrize(
    ("sent", "statuses"),
    [
        (b"", []),  # each of these connections ends by itself
        (b"GET /hea", []),
        (GET + b"GET /hea", [200]),
        (GET * 3 + b"?", [200] * 3),
        (b"\x16\x03\x01 no HTTP\r\n\r\n", [400]),
        (POST + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n", [400]),
        (CHUNKED + b"zz\r\nabc\r\n", [400]),
        (CHUNKED + b"3\r\nabc\r\nzz\r\n", [400]),
        (CHUNKED.replace(b"json", b"no") + ANSWER + b"3\r\nabc\r\nzz\r\n", [415]),
        (POST + b"Content-Length: 3\r\n\r\nabc" + b"no HTTP\r\n\r\n", [200, 400]),
        (GET[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n", [200]),
    ],
    ids=["nothing", "half", "half-second", "pipeline", "tls", "length", "chunk", "chunk-2", "refused", "garbage", "ws"],
)
def test_connections_end(sent: bytes, statuses: list[int], caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        hand = Hand()
        hand.open.set()
        async with listening(hand, caplog) as (port, _):
            got = await exchange(port, sent)
        assert [int(part[:3]) for part in got.split(b"HTTP/1.1 ")[1:]] == statuses
        if 400 in statuses:
            assert got.endswith(b'{"error": "the request is not valid HTTP"}')

    scenario(test)


def test_connections_end_however_they_trickle(caplog: pytest.LogCaptureFixture) -> None:
    """A head that comes byte by byte, and an answer that nobody reads, have the time of an idle connection."""

    async def trickle(port: int) -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        start = asyncio.get_running_loop().time()
        writer.write(GET[:-2])
        while not reader.at_eof():
            writer.write(b"y")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), 0.01)
        writer.close()
        return asyncio.get_running_loop().time() - start

    async def test() -> None:
        hand = Hand()
        hand.open.set()
        async with listening(hand, caplog) as (port, connections):
            assert 0.2 < await trickle(port) < 10
            body = b"x" * (15 << 20)  # echoed: more than the buffers of two sockets hold
            with socket.socket() as deaf:
                deaf.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(deaf, ("127.0.0.1", port))
                await loop.sock_sendall(deaf, POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
                await until(lambda: len(connections) == 1)
                await until(lambda: not connections)

    scenario(test)
