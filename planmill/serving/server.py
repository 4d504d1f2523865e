"""`planmill serve`: Ray Serve keeps the workers alive, one process each; this process speaks HTTP and makes batches.

Ray's own HTTP proxy is not used: it has no limit on bodies, answers 503 for a full queue and 500 for a lost worker, and
passes requests on one by one, which costs several milliseconds each.
"""

import asyncio
import contextlib
import io
import logging
import os
import resource
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from planmill.engine import Plan, PlanError
from planmill.errors import PlanmillError
from planmill.ray_settings import keep_ray_private
from planmill.serving.dispatch import Limits
from planmill.serving.payloads import ImageSettings
from planmill.serving.pool import CONNECTIONS, Pool, listen
from planmill.serving.worker import Worker

_APP = "planmill"
_BACKLOG = 256  # connections that the kernel holds until they are accepted, which may happen to all of them at once
_OTHER_FILES = 256  # of this process: Ray, the workers' sockets, the event loop


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


class Replica:
    """What Ray Serve starts: a worker that listens at a socket.

    Args:
        path, images, threads: of the worker.
        folder: for the socket.
    """

    def __init__(self, path: str, images: ImageSettings, threads: int, folder: str) -> None:
        self._thread = listen(Path(folder), Worker(path, images, threads).answer)

    def check_health(self) -> None:
        """Asked by Ray Serve, which replaces the process where this raises."""
        if not self._thread.is_alive():
            raise RuntimeError("no longer listening")

    def __call__(self) -> None:
        """Ray Serve wants one; requests come through the socket."""


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
    _reserve_files(settings.limits.max_connections)
    asked: list[int] = []
    with (
        _bound(settings.host, settings.port) as sock,
        tempfile.TemporaryDirectory(prefix="planmill-") as name,
        _workers(path, settings, Path(name)),
        _signals(asked.append),  # last: starting, Ray sets handlers of its own, which end the process at once
    ):
        _run(plan, settings, sock, Path(name), started, asked)


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


def _reserve_files(connections: int) -> None:
    """Raise this process's limit of open files to what so many connections need.

    Raises:
        PlanmillError: the system does not allow that.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _BACKLOG + _OTHER_FILES
    if hard != resource.RLIM_INFINITY and needed > hard:
        most = max(0, hard - _BACKLOG - _OTHER_FILES)
        raise PlanmillError(
            f"--max-connections {connections} needs {needed} open files, and the system allows {hard} (ulimit -Hn): "
            f"ask for at most {most}"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


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
def _workers(path: Path, settings: Settings, folder: Path) -> Iterator[None]:
    """Workers that Ray Serve starts, watches and restarts, with sockets in `folder`; gone at the end."""
    keep_ray_private()
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
        object_store_memory=128 << 20,  # requests do not pass through it
    )
    try:
        for name in ("ray.serve", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR", "enable_access_log": False})
        threads = settings.threads or max(1, (os.cpu_count() or 1) // settings.workers)
        deployment: Any = serve.deployment(  # its overloads do not know a class with options
            Replica,
            name="Worker",
            num_replicas=settings.workers,
            ray_actor_options={"num_cpus": 0},
            health_check_period_s=1,
            health_check_timeout_s=30,
            graceful_shutdown_timeout_s=5,
        )
        bound = deployment.bind(str(path.absolute()), settings.images, threads, str(folder))
        try:
            serve.run(bound, name=_APP, route_prefix=None, blocking=False)
        except RuntimeError as error:
            raise PlanError(f"{path}: a worker cannot open it: {serve.status().applications[_APP].message}") from error
        yield
    finally:
        # Ray prints that its controller, which it has just ended, is to be started again.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with contextlib.suppress(Exception):
                serve.shutdown()
            ray.shutdown()


def _run(
    plan: Plan,
    settings: Settings,
    sock: socket.socket,
    folder: Path,
    started: Callable[[str], None],
    asked: list[int],
) -> None:
    """Answer HTTP until a signal came."""
    import uvicorn

    from planmill.serving.gateway import Gateway
    from planmill.serving.protocol import bounded

    limits = replace(settings.limits, slots=CONNECTIONS * settings.workers)
    pool = Pool(folder)
    gateway = Gateway(pool, describe(plan), limits)
    config = uvicorn.Config(
        gateway.app,
        log_level="error",
        access_log=False,
        lifespan="on",
        http=bounded(limits.max_connections),
        ws="none",
        backlog=_BACKLOG,
        h11_max_incomplete_event_size=16 << 10,
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

    with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run())


def describe(plan: Plan) -> dict[str, Any]:
    """What GET / says of a plan."""
    fields = {"model", "target", "precision", "inputs", "outputs", "dynamic", "metadata"}
    return plan.manifest.model_dump(mode="json", include=fields)
