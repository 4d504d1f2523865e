"""`planmill serve` as a user starts it: a real HTTP client, damaged requests, a killed worker, and the end."""

import contextlib
import io
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import nn

from planmill.cli import main
from planmill.engine import Plan
from planmill.serving.payloads import JSON, NPY, SAFETENSORS, ImageSettings, decode
from planmill.serving.worker import Worker


class Server:
    """The process, and a client on its port."""

    def __init__(self, plan: Path, folder: Path) -> None:
        script = Path(sys.executable).with_name("planmill")
        options = ["--port", "0", "--json", "--max-body-mib", "0.25", "--max-pixels", "10000", "--max-batch", "8"]
        options += ["--max-connections", "32"]
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            [str(script), "serve", str(plan), *options], stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd="/"
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.said()
        self.url = json.loads(line)["url"]
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def workers(self) -> list[int]:
        """The processes below this one that hold the plan."""
        parents: dict[int, int] = {}
        titles: dict[int, bytes] = {}
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(ValueError, OSError):  # no process, or one that ended
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                titles[int(entry.name)] = (entry / "cmdline").read_bytes()
        below = {self.process.pid}
        while more := {process for process, parent in parents.items() if parent in below} - below:
            below |= more
        return [process for process in below if b"ServeReplica" in titles.get(process, b"")]


def as_npy(x: torch.Tensor) -> bytes:
    file = io.BytesIO()
    numpy.save(file, x.numpy())
    return file.getvalue()


def check_answers_in_every_form(server: Server, judge: nn.Module) -> None:
    assert server.url.startswith("http://127.0.0.1:")
    assert server.client.get("/health").json() == {"status": "ok", "workers": 1}
    shown = server.client.get("/").json()
    assert [spec["name"] for spec in shown["inputs"] + shown["outputs"]] == ["x", "scores", "label"]
    x = torch.randn(3, 3, 8, 8)
    with torch.no_grad():
        wanted = judge(x)
    bodies = [(json.dumps({"inputs": x.tolist()}).encode(), JSON), (as_npy(x), NPY), (save({"x": x}), SAFETENSORS)]
    for body, kind in bodies:
        answer = server.client.post("/predict", content=body, headers={"content-type": kind, "accept": SAFETENSORS})
        assert answer.status_code == 200, answer.text
        got = load(answer.content)
        torch.testing.assert_close(got["scores"], wanted["scores"], atol=1e-5, rtol=1e-5)
        assert torch.equal(got["label"], wanted["label"])
        answer = server.client.post("/predict", content=body, headers={"content-type": kind})
        assert answer.json()["outputs"]["label"] == wanted["label"].tolist()
    file = io.BytesIO()
    Image.new("RGB", (20, 10), (255, 0, 0)).save(file, "PNG")
    answer = server.client.post("/predict", content=file.getvalue(), headers={"content-type": "image/png"})
    red = torch.tensor([1.0, 0.0, 0.0]).reshape(1, 3, 1, 1).expand(1, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(torch.tensor(answer.json()["outputs"]["scores"]), judge(red)["scores"])


def check_concurrent_callers_get_their_own(server: Server, judge: nn.Module) -> None:
    inputs = torch.randn(64, 3, 8, 8)
    answers: dict[int, torch.Tensor] = {}

    def work(start: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for i in range(start, len(inputs), 8):
                headers = {"content-type": NPY, "accept": SAFETENSORS}
                answer = client.post("/predict", content=as_npy(inputs[i : i + 1]), headers=headers)
                answers[i] = load(answer.content)["scores"][0]

    run_threads(work, 8)
    with torch.no_grad():
        wanted = judge(inputs)["scores"]
    torch.testing.assert_close(torch.stack([answers[i] for i in range(64)]), wanted, atol=1e-5, rtol=1e-5)


def run_threads(work, count: int) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def check_damaged_requests_get_a_4xx(server: Server) -> None:
    rng = random.Random(int(os.environ.get("PLANMILL_FUZZ_SEED", "0")))
    x = torch.randn(1, 3, 8, 8)
    good = [(json.dumps({"inputs": x.tolist()}).encode(), JSON), (as_npy(x), NPY), (save({"x": x}), SAFETENSORS)]
    statuses: Counter[int] = Counter()
    for i in range(60):
        body, kind = good[i % 3]
        damaged = bytearray(body)
        for _ in range(rng.randrange(1, 6)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        if rng.random() < 0.3:
            del damaged[rng.randrange(len(damaged)) :]
        if rng.random() < 0.1:
            damaged *= 1 + (1 << 18) // len(body)
        headers = {"content-type": rng.choice([kind, kind, JSON, "image/png", "image/jpeg", "x/y"])}
        answer = server.client.post("/predict", content=bytes(damaged), headers=headers)
        statuses[answer.status_code] += 1
        assert answer.status_code == 200 or 10 < len(answer.json()["error"]) < 500
    assert statuses.keys() <= {200, 400, 413, 415}, statuses
    assert statuses[400] > 20
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=20) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx: " + b"y" * 17_000)  # a head that does not end
        assert connection.recv(12) == b"HTTP/1.1 400"


def check_a_crowd_of_idle_connections_keeps_nobody_out(server: Server) -> None:
    """Three hundred sockets that send nothing or never enough, and thirty-two places."""
    address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-npy\r\nContent-Length: 9000\r\n"
    files = Path(f"/proc/{server.process.pid}/fd")
    before = len(list(files.iterdir()))
    with contextlib.ExitStack() as crowd:
        for i in range(300):
            connection = crowd.enter_context(socket.create_connection(address, timeout=20))
            with contextlib.suppress(ConnectionError):  # its place may be taken already
                connection.sendall((b"", head, head + b"\r\nhalf")[i % 3])
        for _ in range(3):
            body = as_npy(torch.randn(1, 3, 8, 8))
            answer = httpx.post(f"{server.url}/predict", content=body, headers={"content-type": NPY}, timeout=20)
            assert answer.status_code == 200, answer.text
        assert len(list(files.iterdir())) <= before + 32


def check_a_killed_worker_costs_only_what_it_had(server: Server) -> None:
    """Eight callers, twelve requests each, and a SIGKILL in the middle; at most its two batches of eight are lost."""
    (worker,) = server.workers()
    answers: list[int] = []  # appending is one step, counting is not
    began = threading.Semaphore(0)

    def work(_: int) -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            for _ in range(12):
                answer = client.post("/predict", content=as_npy(torch.randn(1, 3, 8, 8)), headers={"content-type": NPY})
                answers.append(answer.status_code)
                if answer.status_code == 503:
                    assert "was lost" in answer.json()["error"]
                began.release()

    def kill() -> None:
        for _ in range(20):
            began.acquire()
        os.kill(worker, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    run_threads(work, 8)
    killer.join()
    statuses = Counter(answers)
    assert statuses.keys() <= {200, 503}, statuses
    assert statuses.total() == 96
    assert statuses[503] <= 16, statuses
    assert worker not in server.workers()


def check_the_end_finishes_what_was_accepted(server: Server) -> None:
    lines = server.client.get("/metrics").text.splitlines()
    assert "planmill_pending_requests 0.0" in lines
    answered = threading.Event()
    statuses: list[int] = []

    def slow() -> Iterator[bytes]:  # accepted before the signal, whole only after it
        body = as_npy(torch.randn(1, 3, 8, 8))
        yield body[:100]
        while "planmill_pending_requests 1.0" not in httpx.get(f"{server.url}/metrics").text:
            pass
        server.process.send_signal(signal.SIGTERM)
        yield body[100:]

    def post() -> None:
        headers = {"content-type": NPY}
        statuses.append(httpx.post(f"{server.url}/predict", content=slow(), headers=headers, timeout=60).status_code)
        answered.set()

    thread = threading.Thread(target=post)
    thread.start()
    assert answered.wait(60)
    thread.join()
    assert statuses == [200]
    assert server.process.wait(60) == 0, server.said()
    assert "Traceback" not in server.said()
    assert not server.workers()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{server.url}/health")


@pytest.fixture
def server(judge_plan: Plan, tmp_path: Path) -> Iterator[Server]:
    server = Server(judge_plan.path, tmp_path)
    yield server
    server.client.close()
    server.process.kill()
    server.process.wait()


def test_one_server_from_start_to_end(server: Server, judge: nn.Module) -> None:
    """One start for all checks: it costs seconds."""
    check_answers_in_every_form(server, judge)
    check_concurrent_callers_get_their_own(server, judge)
    check_damaged_requests_get_a_4xx(server)
    check_a_crowd_of_idle_connections_keeps_nobody_out(server)
    check_a_killed_worker_costs_only_what_it_had(server)
    check_the_end_finishes_what_was_accepted(server)


def test_a_surprise_in_one_body_costs_one_request(judge_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    def surprising(body: bytes, *rest: Any) -> list[torch.Tensor]:
        if body == b"x":
            raise SystemError("a library's own")
        return decode(body, *rest)

    monkeypatch.setattr("planmill.serving.worker.decode", surprising)
    good = (as_npy(torch.randn(1, 3, 8, 8)), NPY, JSON)
    answers = Worker(str(judge_plan.path), ImageSettings(), torch.get_num_threads()).answer(
        [good, (b"x", NPY, JSON), good]
    )
    assert [status for status, _, _ in answers] == [200, 400, 200]
    assert json.loads(answers[1][2]) == {"error": "the body cannot be read: SystemError"}


def test_mistakes_are_one_line(
    judge_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, message in (
        ([tmp_path / "no.plan"], "no such file"),
        ([judge_plan.path, "--host", "203.0.113.7", "--port", "0"], "cannot listen on 203.0.113.7:0"),
        ([judge_plan.path, "--mean", "a"], "--mean must be numbers separated by commas, got 'a'"),
        ([judge_plan.path, "--mean", "1,2"], "--mean: one number, or one per channel of float32 (batch, 3, 8, 8)"),
        ([judge_plan.path, "--std", "0"], "--std must be positive"),
        ([judge_plan.path, "--max-body-mib", "0"], "--max-body-mib must be above 0"),
        ([judge_plan.path, "--max-connections", "5000"], "the system allows 2000 (ulimit -Hn): ask for at most 1488"),
    ):
        monkeypatch.setattr(resource, "getrlimit", lambda _: (2000, 2000))
        monkeypatch.setattr(sys, "argv", ["planmill", "serve", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())
