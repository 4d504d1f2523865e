"""Admission, limits and batches of the HTTP side, with a worker that the test holds in its hand."""

import asyncio
import json
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from planmill.serving.dispatch import Limits
from planmill.serving.gateway import Gateway
from planmill.serving.payloads import JSON, NPY, SAFETENSORS
from planmill.serving.pool import CONNECTIONS, Pool, listen
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


def test_bodies_that_do_not_come_keep_nobody_out() -> None:
    """What was announced and not sent counts for nothing; what was sent does."""

    async def never() -> AsyncIterator[bytes]:
        yield b"0123456789"
        await asyncio.Event().wait()

    async def test() -> None:
        hand = Hand()
        hand.open.set()
        async with serving(hand, max_pending=1, max_pending_bytes=35, max_body=35, max_wait_ms=0) as (client, gateway):
            headers = {**HEAD, "content-length": "25"}
            slow = []
            for held in (10, 20):
                slow.append(asyncio.create_task(client.post("/predict", headers=headers, content=never())))
                await until(lambda held=held: sample(gateway, "planmill_pending_bytes") == held)  # type: ignore[misc]
            for _ in range(3):
                assert (await client.post("/predict", headers=HEAD, content=b"x" * 15)).status_code == 200
            refused = await client.post("/predict", headers=HEAD, content=b"x" * 16)
            assert (refused.status_code, sample(gateway, "planmill_pending_bytes")) == (429, 20)
            for task in slow:
                task.cancel()
            await until(lambda: sample(gateway, "planmill_pending_bytes") == 0)
            assert sample(gateway, "planmill_pending_requests") == 0

    scenario(test)


def sample(gateway: Gateway, name: str) -> float | None:
    """A number of /metrics."""
    return gateway.metrics.registry.get_sample_value(name)


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
