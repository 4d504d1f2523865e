"""Callers that never pause, against `planmill serve` and against what a user would write: FastAPI around the model.

    python benchmarks/serving/load.py [--model module.py:factory --input 3x224x224] [--seconds 60] [--json]

Both servers are up all the time and take turns of a few seconds, each alone; the callers live in this process and keep
their connections. A request is one sample as .npy, and so is the answer. Before timing, both answers are compared.
"""

import argparse
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy

CASES: list = []  # nothing for `planmill bench`: a server is measured from outside

NPY = "application/x-npy"
EAGER = """
import io, sys
import numpy, torch, uvicorn
from fastapi import FastAPI, Request, Response
from planmill.engine.models import load_model

source, port = sys.argv[1:]
app, model = FastAPI(), load_model(source, random_weights=":" not in source)

def compute(body):
    with torch.inference_mode():
        output = model(torch.from_numpy(numpy.load(io.BytesIO(body))))
    file = io.BytesIO()
    numpy.save(file, output.numpy())
    return file.getvalue()

@app.post("/predict")
async def predict(request: Request):
    from fastapi.concurrency import run_in_threadpool
    return Response(await run_in_threadpool(compute, await request.body()), media_type="application/x-npy")

@app.get("/health")
def health():
    return {}

uvicorn.run(app, host="127.0.0.1", port=int(port), log_level="warning", access_log=False)
"""


@dataclass
class Load:
    """What the callers of one server saw."""

    seconds: float = 0.0
    latencies: list[float] = field(default_factory=list)
    statuses: Counter = field(default_factory=Counter)

    def row(self, name: str, clients: int) -> dict:
        """The numbers that are reported."""
        p50, p99 = (1e3 * float(numpy.percentile(self.latencies, q)) for q in (50, 99))
        errors = sum(count for status, count in self.statuses.items() if status != 200)
        rate = self.statuses[200] / self.seconds
        row = {"server": name, "clients": clients, "seconds": round(self.seconds, 1), "requests_per_s": round(rate, 1)}
        return row | {"p50_ms": round(p50, 2), "p99_ms": round(p99, 2), "errors": errors}


def turn(port: int, bodies: list[bytes], clients: int, seconds: float, load: Load) -> None:
    """Let the callers call for some seconds, and add what they saw."""
    started = time.perf_counter()
    seen = [Counter() for _ in range(clients)]  # one of each thread's own

    def call(first: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        i = first
        while time.perf_counter() - started < seconds:
            before = time.perf_counter()
            status, _ = post(connection, bodies[i % len(bodies)])
            load.latencies.append(time.perf_counter() - before)
            seen[first][status] += 1
            i += clients
        connection.close()

    threads = [threading.Thread(target=call, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.statuses.update(sum(seen, Counter()))
    load.seconds += time.perf_counter() - started


def post(connection: http.client.HTTPConnection, body: bytes) -> tuple[int, bytes]:
    """One request: status and body of the answer; status 0 where the connection broke."""
    try:
        connection.request("POST", "/predict", body, {"content-type": NPY, "accept": NPY})
        answer = connection.getresponse()
        return answer.status, answer.read()
    except (OSError, http.client.HTTPException):
        connection.close()
        return 0, b""


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Until the server answers.

    Raises:
        SystemExit: its process ended.
    """
    while process.poll() is None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        except OSError:
            time.sleep(0.1)
        finally:
            connection.close()
    raise SystemExit(f"a server ended with {process.returncode} before it answered")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def start(arguments: argparse.Namespace, folder: Path) -> dict[str, tuple[int, subprocess.Popen]]:
    """Build the plan and start both servers."""
    planmill = [sys.executable, "-m", "planmill.cli"]
    plan, ports = folder / "model.plan", (free_port(), free_port())
    source = arguments.model
    if ":" in source:
        source = str(Path(source.partition(":")[0]).absolute()) + ":" + source.partition(":")[2]
    options = ["--input", arguments.input, "--batch", "1:8:64", "--out", str(plan)]
    random = [] if ":" in source else ["--random-weights", "--seed", "0"]
    subprocess.run([*planmill, "build", source, *options, *random], check=True, cwd=folder, stdout=subprocess.DEVNULL)
    ours = [*planmill, "serve", str(plan), "--port", str(ports[0]), "--workers", str(arguments.workers)]
    theirs = [sys.executable, "-c", EAGER, source, str(ports[1])]
    servers = {}
    for name, command, port in (("planmill serve", ours, ports[0]), ("FastAPI + eager", theirs, ports[1])):
        servers[name] = port, subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL)
    for port, process in servers.values():
        wait_for(port, process)
    return servers


def compare(servers: dict[str, tuple[int, subprocess.Popen]], body: bytes) -> float:
    """The largest difference of the two answers, relative to the largest value."""
    answers = []
    for port, _ in servers.values():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        status, content = post(connection, body)
        connection.close()
        if status != 200:
            raise SystemExit(f"port {port} answered {status}: {content[:300]!r}")
        answers.append(numpy.load(io.BytesIO(content)))
    return float(numpy.abs(answers[0] - answers[1]).max() / numpy.abs(answers[1]).max())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    digits = Path(__file__).parents[2] / "examples" / "digits" / "model.py"
    parser.add_argument("--model", default=f"{digits}:load_model", help="module.py:factory, or a timm model")
    parser.add_argument("--input", default="1x32x32", help="shape of a sample; float32")
    parser.add_argument("--seconds", type=float, default=10.0, help="of load on each server")
    parser.add_argument("--turn", type=float, default=5.0, help="seconds after which the other server has its turn")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="one row per line")
    arguments = parser.parse_args()
    generator = numpy.random.default_rng(0)
    bodies = []
    for _ in range(16):
        file = io.BytesIO()
        sizes = [int(size) for size in arguments.input.split("x")]
        numpy.save(file, generator.standard_normal((1, *sizes)).astype(numpy.float32))
        bodies.append(file.getvalue())
    servers: dict[str, tuple[int, subprocess.Popen]] = {}
    with tempfile.TemporaryDirectory() as folder:
        try:
            servers = start(arguments, Path(folder))
            difference = compare(servers, bodies[0])
            if not difference < 1e-3:
                raise SystemExit(f"the two answers differ by {difference:.2g} of their size: not timed")
            loads = {name: Load() for name in servers}
            for port, _ in servers.values():
                turn(port, bodies, arguments.clients, min(2.0, arguments.seconds), Load())
            while min(load.seconds for load in loads.values()) < arguments.seconds:
                for name, (port, _) in servers.items():
                    turn(port, bodies, arguments.clients, min(arguments.turn, arguments.seconds), loads[name])
        finally:
            for _, process in servers.values():
                process.send_signal(signal.SIGTERM)
            for _, process in servers.values():
                process.wait(90)
    for name, load in loads.items():
        row = load.row(name, arguments.clients)
        if arguments.json:
            print(json.dumps(row | {"model": arguments.model, "cores": os.cpu_count()}))
        else:
            print("  ".join(f"{key} {value}" for key, value in row.items()))


if __name__ == "__main__":
    main()
