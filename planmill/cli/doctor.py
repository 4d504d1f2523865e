"""`planmill doctor`: what this machine can run."""

import importlib.metadata
import json
import platform
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

PACKAGES = ("torch", "triton", "cupy-cuda13x", "tensorrt-rtx", "timm", "transformers", "faiss-cpu")


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say which backend runs each op on this machine, and why a faster one does not."""
    import torch

    from planmill import __version__, kernels

    report: dict[str, Any] = {
        "planmill": __version__,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {"instruction_sets": list(kernels.cpu_capabilities()), "threads": torch.get_num_threads()},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "ops": [
            {"op": c.op, "device": c.device, "backend": c.backend, "missing": list(c.missing)}
            for device in ("cpu", "cuda")
            for c in (kernels.which(name, device) for name in kernels.ops())
        ],
    }
    if as_json:
        print(json.dumps(report, indent=2))
        return
    console = Console()
    console.print(f"planmill {report['planmill']}, Python {report['python']}")
    console.print("packages: " + ", ".join(f"{k} {v or 'not installed'}" for k, v in report["packages"].items()))
    console.print(
        f"cpu: {', '.join(report['cpu']['instruction_sets']) or 'no extension'}; threads: {report['cpu']['threads']}"
    )
    console.print(f"gpu: {report['gpu'] or 'none'}")
    table = Table("op", "device", "runs", "why nothing faster")
    for row in report["ops"]:
        table.add_row(row["op"], row["device"], row["backend"], "\n".join(row["missing"]))
    console.print(table)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
