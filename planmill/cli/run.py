"""`planmill run`: a plan on files or random inputs, with latencies."""

import json
import time
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from planmill.errors import PlanmillError

if TYPE_CHECKING:
    import torch

    from planmill.engine import Session

_WARM_UP = 3


def run(
    plan: Annotated[Path, typer.Argument(help="A plan file. It holds native code: run only plans you trust.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", "-i", help="x.npy, NAME=x.npy, x.npz or x.safetensors (named tensors), or random."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the outputs to this .npz.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Runs to time.")] = 20,
    batch: Annotated[int | None, typer.Option(min=1, help="Size of every dynamic dimension of random inputs.")] = None,
    seed: Annotated[int, typer.Option(help="Of random inputs.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Run a plan; print the outputs' shapes and the latency in milliseconds (p20, p50, p80)."""
    if out is not None and (out.suffix != ".npz" or out.is_dir() or not out.parent.is_dir()):
        raise PlanmillError(f"{out}: must be the name of an .npz file in a directory that exists")
    from planmill.engine import Session

    sources = inputs or ["random"]
    session = Session(plan)
    if sources == ["random"]:
        tensors = _random(session, batch, seed)
    else:
        if batch is not None:
            raise PlanmillError("--batch is for random inputs; a file has its own")
        tensors = _read(session, sources)
    outputs = session.run(tensors)
    ordered = [tensors[spec.name] for spec in session.inputs]
    for _ in range(_WARM_UP):
        session(*ordered)
    times = []
    for _ in track(range(repeat), "running", console=Console(stderr=True), transient=True):
        start = time.perf_counter()
        session(*ordered)
        times.append((time.perf_counter() - start) * 1e3)
    if out is not None:
        _write(out, outputs)
    _report(outputs, times, out, as_json)


def _random(session: "Session", batch: int | None, seed: int) -> dict[str, "torch.Tensor"]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    ranges = session.plan.manifest.dynamic
    if batch is not None and not ranges:
        raise PlanmillError("--batch: the plan's sizes are all fixed")
    tensors = {}
    for spec in session.inputs:
        shape = [(batch or ranges[d].optimum) if isinstance(d, str) else d for d in spec.shape]
        dtype = spec.torch_dtype
        # Integers are 0 or 1: the plan does not say which others its model takes.
        drawn = torch.randn(shape, generator=generator)
        tensors[spec.name] = drawn.to(dtype) if dtype.is_floating_point else (drawn > 0).to(dtype)
    return tensors


def _read(session: "Session", sources: list[str]) -> dict[str, "torch.Tensor"]:
    """Tensors by name: named by the file, by NAME=, or by the order of the plan's inputs."""
    names = [spec.name for spec in session.inputs]
    tensors: dict[str, torch.Tensor] = {}
    for source in sources:
        name, equals, file = source.partition("=")
        if not equals or name not in names:
            name, file = "", source
        path = Path(file)
        if not path.is_file():
            hint = "; random inputs come alone" if file == "random" else ""
            raise PlanmillError(f"{path}: no such file{hint}")
        found = _load(path)
        if None in found:
            left = [candidate for candidate in names if candidate not in tensors]
            if not name and not left:
                raise PlanmillError(f"{path}: the plan takes only {', '.join(names)}")
            found = {name or left[0]: found[None]}
        elif name:
            raise PlanmillError(f"{path}: names its tensors itself; give it without {name}=")
        for key, value in found.items():
            if key in tensors:
                raise PlanmillError(f"{path}: input {key} is given twice")
            tensors[str(key)] = value
    return tensors


def _load(path: Path) -> dict[str | None, "torch.Tensor"]:
    """The tensors of a file by name; None is the name of a lone array."""
    import numpy
    import torch

    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path).items())
        except SafetensorError as error:
            raise PlanmillError(f"{path}: no safetensors file: {error}") from error
    if path.suffix not in (".npy", ".npz"):
        raise PlanmillError(f"{path}: inputs are .npy, .npz or .safetensors files")
    try:
        content = numpy.load(path, allow_pickle=False)
        arrays = {None: content} if isinstance(content, numpy.ndarray) else dict(content.items())
        return {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
    except (ValueError, TypeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise PlanmillError(f"{path}: cannot be read as numbers: {error}") from error


def _write(out: Path, outputs: dict[str, "torch.Tensor"]) -> None:
    """NumPy has no bfloat16: such an output is written as float32, which holds it exactly."""
    import numpy
    import torch

    arrays = {name: (x.float() if x.dtype == torch.bfloat16 else x).numpy() for name, x in outputs.items()}
    try:
        with out.open("wb") as file:
            numpy.savez(file, **arrays)  # type: ignore[arg-type]
    except OSError as error:
        raise PlanmillError(f"{out}: cannot be written: {error.strerror}") from error


def _report(outputs: dict[str, "torch.Tensor"], times: list[float], out: Path | None, as_json: bool) -> None:
    import numpy

    p20, p50, p80 = (float(value) for value in numpy.percentile(times, [20, 50, 80]))
    rows = {name: {"dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)} for name, x in outputs.items()}
    if as_json:
        latency = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "repeat": len(times)}
        print(json.dumps({"outputs": rows, **latency, "out": str(out) if out else None}, indent=2))
        return
    console = Console()
    table = Table("output", "dtype", "shape")
    for name, row in rows.items():
        table.add_row(escape(name), str(row["dtype"]), escape(str(row["shape"])))
    console.print(table)
    console.print(f"latency in ms over {len(times)} runs: p20 {p20:.3f}, p50 {p50:.3f}, p80 {p80:.3f}")
    if out is not None:
        console.print(f"written: {out}", markup=False)
