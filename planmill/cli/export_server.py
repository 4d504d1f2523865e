"""`planmill export-server`: a plan as a model repository."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console


def export_server(
    plan: Annotated[Path, typer.Argument(help="A plan file.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The model repository; a folder for the plan is added.")],
    name: Annotated[str | None, typer.Option(help="Of the model. Default: the plan's file name.")] = None,
    instances: Annotated[int, typer.Option(min=1, max=1024, help="Copies that run at once.")] = 1,
    threads: Annotated[int, typer.Option(min=0, help="Of each copy on the CPU. Default: torch's choice.")] = 0,
    max_delay_us: Annotated[int, typer.Option(min=0, help="How long a request waits for others.")] = 1000,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Write a model repository for NVIDIA Triton Inference Server; runs none of the plan's code."""
    from planmill.serving.triton_repository import RepositorySettings, write_repository

    settings = RepositorySettings(instances, threads, max_delay_us, max_queue)
    folder = write_repository(plan, out, name, settings)
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if as_json:
        print(json.dumps({"model": folder.name, "folder": str(folder), "files": files}))
        return
    Console(highlight=False).print(f"{folder}: {', '.join(files)}", soft_wrap=True, markup=False)
