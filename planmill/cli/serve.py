"""`planmill serve`: a plan behind HTTP."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from planmill.errors import PlanmillError


def serve(
    plan: Annotated[Path, typer.Argument(help="A plan file. It holds native code: serve only plans you trust.")],
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets the network in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Processes that each hold the plan.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Of each worker. Default: the cores divided among them.")] = 0,
    max_batch: Annotated[int, typer.Option(min=1, help="Requests in a batch at most.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(min=0, max=1000, help="That a lone request waits for others.")] = 1.0,
    max_pending: Annotated[int, typer.Option(min=1, help="Requests read and unanswered; more get a 429.")] = 256,
    max_connections: Annotated[
        int, typer.Option(min=1, help="Open at once; one more takes the place of the one that idles longest.")
    ] = 1024,
    max_body_mib: Annotated[float, typer.Option(help="Of one request; more get a 413.")] = 16.0,
    max_pixels: Annotated[int, typer.Option(min=1, help="Of one image; more get a 413.")] = 1 << 24,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Of reading a body, and of an answer.")] = 60.0,
    mean: Annotated[str, typer.Option(help="Of images scaled to 0..1: a number, or one per channel.")] = "0",
    std: Annotated[str, typer.Option(help="As --mean.")] = "1",
    as_json: Annotated[bool, typer.Option("--json", help="Print the address as JSON.")] = False,
) -> None:
    """Answer POST /predict with a plan, in batches, until Ctrl-C or SIGTERM; also /health and /metrics."""
    if not 0 < max_body_mib <= 4096:
        raise PlanmillError(f"--max-body-mib must be above 0 and at most 4096, got {max_body_mib}")
    images = {"mean": _numbers("--mean", mean), "std": _numbers("--std", std)}
    from planmill.serving.dispatch import Limits
    from planmill.serving.payloads import ImageSettings
    from planmill.serving.server import Settings, serve_plan

    max_body = int(max_body_mib * 2**20)
    limits = Limits(
        max_batch=max_batch,
        max_wait_ms=max_wait_ms,
        max_pending=max_pending,
        max_pending_bytes=max(256 << 20, 2 * max_body),
        max_body=max_body,
        timeout_s=timeout_s,
        max_connections=max_connections,
    )
    settings = Settings(
        host=host,
        port=port,
        workers=workers,
        threads=threads,
        limits=limits,
        images=ImageSettings(max_pixels=max_pixels, **images),
        drain_s=2 * timeout_s,  # of reading a body, and of an answer
    )
    console = Console(stderr=True, highlight=False)

    def started(url: str) -> None:
        if as_json:
            print(json.dumps({"url": url, "workers": workers}), flush=True)
        else:
            console.print(f"{plan} answers at {url}/predict (also /health, /metrics); Ctrl-C ends it", soft_wrap=True)

    console.print("starting the workers ...")
    serve_plan(plan, settings, started)


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise PlanmillError(f"{option} must be numbers separated by commas, got {text!r}") from None
