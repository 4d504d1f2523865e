"""`planmill serve`: Ray Serve keeps the workers alive, one process each; this process speaks HTTP and makes batches.

Ray's own HTTP proxy is not used: it has no limit on bodies, answers 503 for a full queue and 500 for a lost worker, and
passes requests on one by one, which costs several milliseconds each. Here a whole batch is one call to a worker.
"""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from planmill.engine import Plan, PlanError
from planmill.errors import PlanmillError
from planmill.serving.dispatch import Answer, Limits
from planmill.serving.payloads import ImageSettings
from planmill.serving.worker import Request, Response, Worker

_APP = "planmill"


@dataclass(frozen=True)
class Settings:
    """How a plan is served.

    Args:
        host, port: where; port 0 takes a free one.
        workers: processes that each hold the plan.
        threads: of each; 0: the machine's cores divided among the workers.
        limits: see there; its slots are set by the number of workers.
        images: how images become inputs.
        drain_s: at the end, how long what was accepted may take.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    threads: int = 0
    limits: Limits = field(default_factory=Limits)
    images: ImageSettings = field(default_factory=ImageSettings)
    drain_s: float = 60.0


def serve_plan(path: Path, settings: Settings, started: Callable[[str], None]) -> None:
    """Serve a plan until SIGTERM or SIGINT; then finish what was accepted.

    Args:
        path: of the plan. It holds native code that the workers run: serve only plans you trust.
        settings: see there.
        started: called with the URL once requests are answered.

    Raises:
        PlanmillError: the plan or the address cannot be used, or the extra `serve` is not installed.
    """
    plan = Plan.read(path)
    plan.check_environment()
    check_images(plan, settings.images)
    with _bound(settings.host, settings.port) as sock:
        asked: list[int] = []
        # Inside: starting, Ray sets handlers of its own, which end the process at once.
        with _workers(path, settings) as (answer, count), _signals(asked.append):
            _run(plan, settings, sock, (answer, count), started, asked)


def check_images(plan: Plan, images: ImageSettings) -> None:
    """Say whether mean and std fit the plan's channels.

    Raises:
        PlanmillError: they do not, or a std is zero.
    """
    shape = plan.manifest.inputs[0].shape
    channels = shape[1] if len(shape) == 4 else None
    for name, values in (("mean", images.mean), ("std", images.std)):
        if len(values) not in (1, channels):
            raise PlanmillError(f"--{name}: one number, or one per channel of {plan.manifest.inputs[0]}")
    if not all(value > 0 for value in images.std):
        raise PlanmillError("--std must be positive")


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A bound socket, before anything slow starts; it accepts only once uvicorn listens on it."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except (OSError, OverflowError) as error:
        raise PlanmillError(f"cannot listen on {host}:{port}: {error}") from error
    with sock:
        yield sock


@contextlib.contextmanager
def _signals(arrived: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM and SIGINT only say that the end is near: what was accepted is finished first."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def handle(number: int, frame: Any) -> None:
        arrived(number)

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _workers(path: Path, settings: Settings) -> Iterator[tuple[Answer, Callable[[], int]]]:
    """Workers that Ray Serve starts, watches and restarts; gone at the end."""
    # Read when Ray is imported: its own ports ask for a token, of this run alone, and listen on loopback (the name says
    # Windows; Linux obeys it too), and it reports no usage to anyone.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    if "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        import ray
        from ray import serve
    except ImportError as error:
        raise PlanmillError(f"serve needs Ray Serve ({error}): pip install 'planmill[serve]'") from error

    logging.getLogger("ray").setLevel(logging.ERROR)
    ray.init(
        address="local",
        num_cpus=max(1, settings.workers),
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        configure_logging=True,
        object_store_memory=max(128 << 20, 2 * settings.limits.max_pending_bytes),
    )
    try:
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.workers)
        deployment: Any = serve.deployment(  # its overloads do not know a class with options
            Worker,
            name="Worker",
            num_replicas=settings.workers,
            max_ongoing_requests=2,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=5,
        )
        bound = deployment.bind(str(path.absolute()), settings.images, threads)
        try:
            handle = serve.run(bound, name=_APP, route_prefix=None, blocking=False)
        except RuntimeError as error:
            raise PlanError(f"{path}: a worker cannot open it: {serve.status().applications[_APP].message}") from error

        async def answer(requests: Sequence[Request]) -> list[Response]:
            return await handle.answer.remote(list(requests))

        def count() -> int:
            states = serve.status().applications[_APP].deployments["Worker"].replica_states
            return sum(number for state, number in states.items() if state == "RUNNING")

        yield answer, count
    finally:
        with contextlib.suppress(Exception):
            serve.shutdown()
        ray.shutdown()


def _run(
    plan: Plan,
    settings: Settings,
    sock: socket.socket,
    workers: tuple[Answer, Callable[[], int]],
    started: Callable[[str], None],
    asked: list[int],
) -> None:
    """Answer HTTP until a signal came."""
    import uvicorn

    from planmill.serving.gateway import Gateway

    limits = replace(settings.limits, slots=2 * settings.workers)
    gateway = Gateway(workers[0], describe(plan), workers[1], limits)
    config = uvicorn.Config(
        gateway.app,
        log_level="warning",
        access_log=False,
        lifespan="on",
        timeout_keep_alive=75,
        timeout_graceful_shutdown=int(settings.drain_s) + 1,
        server_header=False,
    )

    class Server(uvicorn.Server):
        """Leaves the signals to `_signals`."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    server = Server(config)

    async def run() -> None:
        task = asyncio.create_task(server.serve([sock]))
        told = False
        while not task.done():
            if server.started and not told:
                host, port = sock.getsockname()[:2]
                started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
                told = True
            server.should_exit = server.should_exit or bool(asked)
            server.force_exit = server.force_exit or len(asked) > 1
            await asyncio.wait([task], timeout=0.1)
        await task

    asyncio.run(run())


def describe(plan: Plan) -> dict[str, Any]:
    """What GET / says of a plan."""
    fields = {"model", "target", "precision", "inputs", "outputs", "dynamic", "metadata"}
    return plan.manifest.model_dump(mode="json", include=fields)
