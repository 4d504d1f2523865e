"""`planmill build`: a model becomes a plan."""

import contextlib
import gc
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from planmill.errors import PlanmillError

if TYPE_CHECKING:
    import torch

    from planmill.engine import Tolerance
    from planmill.engine.manifest import Plugins, Precision

_STAGES = {
    "load": "loading the model",
    "capture": "capturing the graph",
    "compile": "compiling",
    "verify": "comparing with the model",
    "write": "writing the plan",
}


def build(
    model: Annotated[str, typer.Argument(help="module.py:factory, package.module:factory, or a timm model's name.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The plan to write, *.plan.")],
    target: Annotated[str, typer.Option(help="What to compile to: aoti, openvino, tensorrt-rtx or tensorrt.")] = "aoti",
    device: Annotated[
        str | None, typer.Option(help="Where the plan runs: cpu or cuda. Target aoti builds for both (default: cpu).")
    ] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    sm: Annotated[str | None, typer.Option(help="TensorRT: GPU architectures of the plan, e.g. 80,86,89,120.")] = None,
    plugins: Annotated[
        str | None,
        typer.Option(
            help="For a GPU: our ops called in Python (python, the default for TensorRT), as kernels inside the plan "
            "(aot, the default for aoti), or lowered to standard operators (none)."
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option(
            "--input",
            "-i",
            help="Shape of one sample, [DTYPE:]SHAPE[:BELOW], e.g. 3x32x32, or int64:16:1000 for 16 integers below "
            "1000. Once per input, in order; the batch dimension comes first by itself. A timm model knows its own.",
        ),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes MIN:OPT:MAX, or one size.")] = "1:8:64",
    static: Annotated[bool, typer.Option("--static", help="Fix the batch size to OPT.")] = False,
    weights: Annotated[Path | None, typer.Option(help="safetensors, or a state dict saved by torch.save.")] = None,
    random_weights: Annotated[
        bool, typer.Option("--random-weights", help="Keep a timm model's random weights.")
    ] = False,
    max_rel: Annotated[float | None, typer.Option(help="Largest error allowed, relative to an output's scale.")] = None,
    cosine: Annotated[float | None, typer.Option(help="Least cosine allowed between plan and model.")] = None,
    seed: Annotated[int, typer.Option(help="Of the example inputs and of random weights.")] = 0,
    accelerate: Annotated[
        bool, typer.Option("--accelerate", help="Replace known blocks (transformers' MoE) by Planmill's layers first.")
    ] = False,
    rewrite: Annotated[
        bool,
        typer.Option("--rewrite/--no-rewrite", help="Exact rewrites: folded norms, merged layers, fewer products."),
    ] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print the manifest as JSON.")] = False,
) -> None:
    """Mill a model into a plan, and prove that the plan computes what the model computes."""
    sizes = _sizes(batch)
    sms = _architectures(sm)
    mode = _plugins(plugins)
    wanted = [_parse_input(text) for text in inputs or []]

    import torch

    from planmill import engine
    from planmill.engine.models import load_model
    from planmill.engine.plan import check_destination
    from planmill.engine.targets import choose_device, find_target

    find_target(target)
    place = choose_device(target, device)
    if precision not in engine.TOLERANCES:
        raise PlanmillError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
    kind: Precision = precision
    check_destination(out)
    tolerance = _tolerance(kind, max_rel, cosine)
    with _progress() as advance, _imports_kept():
        advance("load", 0.0)
        torch.manual_seed(seed)
        module = load_model(model, weights, random_weights=random_weights)
        plan = engine.build(
            module,
            _examples(wanted or _own_inputs(module), sizes[1]),
            out,
            target=target,
            device=place,
            precision=kind,
            plugins=mode,
            sms=sms,
            dynamic=None if static else engine.DynamicDim("batch", *sizes),
            tolerance=tolerance,
            accelerate=accelerate,
            rewrite=rewrite,
            progress=advance,
        )
    if as_json:
        print(plan.manifest.model_dump_json(indent=2))
        return
    from planmill.cli.info import describe

    describe(plan, Console())


@contextlib.contextmanager
def _imports_kept() -> Iterator[None]:
    """A build allocates much; without this the collector goes through all that is imported every time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[str, float], None]]:
    """One line per stage on standard error, gone at the end; a bar moves where the stage knows how far it is."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def advance(stage: str, fraction: float) -> None:
            for name, task in tasks.items():
                if name != stage:
                    bar.update(task, total=1, completed=1)
            if stage not in tasks:
                tasks[stage] = bar.add_task(_STAGES[stage], total=1 if stage == "verify" else None)
            bar.update(tasks[stage], completed=fraction)

        yield advance


def _tolerance(precision: "Precision", max_rel: float | None, cosine: float | None) -> "Tolerance | None":
    """The precision's own tolerance with what the user changed; None for no change."""
    from planmill.engine import TOLERANCES, Tolerance

    changes = {name: value for name, value in (("max_rel", max_rel), ("cosine", cosine)) if value is not None}
    if max_rel is not None and not 0 <= max_rel < math.inf:
        raise PlanmillError(f"--max-rel must be a number from 0, got {max_rel}")
    if cosine is not None and not -1 <= cosine <= 1:
        raise PlanmillError(f"--cosine must be -1 to 1, got {cosine}")
    return Tolerance(**(TOLERANCES[precision].model_dump() | changes)) if changes else None


def _architectures(text: str | None) -> tuple[int, ...]:
    """ "80,120" -> 80, 120; in order, each once."""
    parts = text.split(",") if text is not None else []
    if not all(part.isdecimal() and 50 <= int(part) < 1000 for part in parts):
        raise PlanmillError(f"--sm must be a list of GPU architectures, e.g. 80,86,89,120, got {text!r}")
    return tuple(sorted({int(part) for part in parts}))


def _plugins(text: str | None) -> "Plugins | None":
    from planmill.engine.targets import PLUGINS

    if text is None:
        return None
    if text not in PLUGINS:
        raise PlanmillError(f"--plugins must be {', '.join(PLUGINS)}, got {text!r}")
    return PLUGINS[text]


def _sizes(text: str) -> tuple[int, int, int]:
    parts = text.split(":")
    if len(parts) not in (1, 3) or not all(part.isdecimal() and int(part) for part in parts):
        raise PlanmillError(f"--batch must be MIN:OPT:MAX or one size, each at least 1, got {text!r}")
    low, opt, high = (int(part) for part in (parts * 3 if len(parts) == 1 else parts))
    if not low <= opt <= high:
        raise PlanmillError(f"--batch must satisfy MIN <= OPT <= MAX, got {text!r}")
    return low, opt, high


def _parse_input(text: str) -> tuple[str, tuple[int, ...], int]:
    """ "int64:4x16:1000" -> dtype, shape, bound; the bound is 2 where none is given."""
    head, *rest = text.split(":")
    dtype, shape, below = "float32", head, "2"
    if head and not head[0].isdecimal():
        dtype, shape, below = head, *(rest + ["", "2"][len(rest) :])[:2]
        rest = rest[2:]
    sizes = shape.split("x") if shape else []
    if rest or not all(size.isdecimal() and int(size) for size in sizes) or not (below.isdecimal() and int(below)):
        raise PlanmillError(f"--input must be [DTYPE:]SHAPE[:BELOW], e.g. 3x32x32 or int64:16:1000, got {text!r}")
    return dtype, tuple(map(int, sizes)), int(below)


def _own_inputs(model: "torch.nn.Module") -> list[tuple[str, tuple[int, ...], int]]:
    """What a timm model says of its input."""
    config = getattr(model, "pretrained_cfg", None) or {}
    if not config.get("input_size"):
        raise PlanmillError("give the shape of each input of one sample: --input 3x224x224")
    return [("float32", tuple(config["input_size"]), 2)]


def _examples(inputs: list[tuple[str, tuple[int, ...], int]], batch: int) -> list["torch.Tensor"]:
    import torch

    examples = []
    for name, shape, below in inputs:
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise PlanmillError(f"--input: torch has no dtype {name!r}")
        if dtype.is_floating_point:
            examples.append(torch.randn(batch, *shape).to(dtype))
        else:
            values = torch.randint(0, below, (batch, *shape))
            flat = values.view(-1)
            flat[:1], flat[-1:] = 0, below - 1  # both extremes: the verification draws between them
            examples.append(values.to(dtype))
    return examples
