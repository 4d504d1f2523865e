"""Connections to a real socket: each ends, however its client behaves, and none keeps the others out."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import uvicorn

from planmill.serving.dispatch import Limits
from planmill.serving.gateway import Gateway
from planmill.serving.protocol import bounded

from .test_serving_gateway import Hand, scenario, until


@asynccontextmanager
async def listening(
    hand: Hand, caplog: pytest.LogCaptureFixture, most: int = 100, idle_s: float = 0.25
) -> AsyncIterator[tuple[int, set[Any]]]:
    """The port of a server and its connections: so many, which may idle so long; nothing goes wrong in it."""
    gateway = Gateway(hand, {"model": "m"}, Limits())
    config = uvicorn.Config(
        gateway.app, port=0, log_config=None, http=bounded(most), ws="none", h11_max_incomplete_event_size=16 << 10
    )
    config.timeout_keep_alive = idle_s  # type: ignore[assignment]
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


def test_a_crowd_that_sends_no_request_keeps_nobody_out(caplog: pytest.LogCaptureFixture) -> None:
    """Idle connections, heads and bodies that never end: each newcomer takes the place of the longest of them."""

    async def test() -> None:
        hand = Hand()
        async with listening(hand, caplog, most=8, idle_s=60) as (port, connections):
            body = POST + b"Content-Length: 1\r\n\r\n"
            early = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            for _, writer in early:
                writer.write(body + b"x")
            await until(lambda: sum(map(len, hand.batches)) == 2)
            crowd = []
            for i in range(60):
                crowd.append(await asyncio.open_connection("127.0.0.1", port))
                crowd[-1][1].write((b"", GET[:-2], body, GET)[i % 4])
                await until(lambda: len(connections) <= 8)
            hand.open.set()
            late = await asyncio.open_connection("127.0.0.1", port)
            late[1].write(body + b"x")
            for reader, _ in (*early, late):  # nobody whose request was whole has lost the answer
                assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")
            ended = 0
            for reader, writer in crowd[:50]:
                with contextlib.suppress(ConnectionResetError):
                    await reader.read()
                ended += 1
                writer.close()
            assert ended == 50
            for _, writer in (*early, late, *crowd[50:]):
                writer.close()

    scenario(test)


def test_where_every_connection_has_a_request_the_next_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    async def test() -> None:
        hand = Hand()
        async with listening(hand, caplog, most=2, idle_s=60) as (port, connections):
            request = POST + b"Content-Length: 1\r\nConnection: close\r\n\r\nx"
            posts = [asyncio.create_task(exchange(port, request)) for _ in range(2)]
            await until(lambda: sum(map(len, hand.batches)) == 2)
            refused = await exchange(port, b"")
            assert refused.startswith(b"HTTP/1.1 503 ")
            assert refused.endswith(b'{"error": "2 requests are under way: try again later"}')
            hand.open.set()
            assert [(await post)[:12] for post in posts] == [b"HTTP/1.1 200"] * 2
            await until(lambda: not connections)
            assert (await exchange(port, request)).startswith(b"HTTP/1.1 200 ")

    scenario(test)
