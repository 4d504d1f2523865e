"""`planmill inspect`: anomalies in a folder of pictures, without training."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from planmill.errors import PlanmillError

if TYPE_CHECKING:
    from planmill.inspection import Inspection

STAGES = {
    "load": "Loading the backbone",
    "read": "Reading the pictures",
    "plan": "Preparing the plan",
    "backbone": "Running the plan",
    "fit": "Fitting the good pictures",
    "score": "Scoring",
    "write": "Writing",
}
LISTED = 10


Images = Annotated[Path, typer.Argument(help="Folder of pictures, searched recursively; never written to.")]
Out = Annotated[Path, typer.Option(help="Folder for scores.csv, scores.json, report.html and heatmaps/.")]
BackboneName = Annotated[str, typer.Option(help="digits, a timm or transformers ViT by name, or FILE.py:FACTORY.")]
MethodName = Annotated[
    str,
    typer.Option(
        help="mutual: against each other; gaussian, padim: against --good pictures, whole or by place; bank: against "
        "patches of good ones kept in a file."
    ),
]
Good = Annotated[Path | None, typer.Option(help="Folder of pictures without anomalies, for all methods but mutual.")]
Bank = Annotated[Path | None, typer.Option(help="bank: file to score against; with --good, the file to make.")]
Extend = Annotated[bool, typer.Option("--extend", help="bank: add the --good pictures to the bank that is there.")]
Share = Annotated[float | None, typer.Option(help="bank: share of the good patches that it keeps; default: 0.1.")]
Dimensions = Annotated[int | None, typer.Option(help="padim: channels drawn from all layers; default: 100.")]
Shrinkage = Annotated[
    float | None, typer.Option(help="gaussian, padim: of the covariances, 0 to 1; default: as published.")
]
Weights = Annotated[Path | None, typer.Option(help="Local file of weights; default: the user's cache.")]
Layers = Annotated[
    str | None, typer.Option(help="Zero-based blocks, e.g. 2,5,8,11; default: the ends of the four quarters.")
]
Size = Annotated[int | None, typer.Option(min=1, help="Side of the input in pixels; default: 518 in whole patches.")]
Radius = Annotated[
    float | None,
    typer.Option(min=0, help="mutual: match only patches at most this far away, in patches."),
]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="Pictures per call of the plan.")]
Precision = Annotated[str, typer.Option(help="fp32 (exact scores) or bf16.")]
Plans = Annotated[Path | None, typer.Option(help="Folder that keeps plans; default: the user's cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")]


def inspect(
    images: Images,
    out: Out,
    backbone: BackboneName,
    method: MethodName = "mutual",
    good: Good = None,
    bank: Bank = None,
    extend: Extend = False,
    share: Share = None,
    dimensions: Dimensions = None,
    shrinkage: Shrinkage = None,
    weights: Weights = None,
    layers: Layers = None,
    size: Size = None,
    radius: Radius = None,
    batch: Batch = 8,
    precision: Precision = "fp32",
    plans: Plans = None,
    as_json: AsJson = False,
) -> None:
    """Score the pictures of a folder against each other or against good ones, and write heat maps and a report."""
    from planmill.inspection import Settings, inspect_pictures

    if precision not in ("fp32", "bf16"):
        raise PlanmillError(f"--precision {precision}: must be fp32 or bf16")
    settings = Settings(
        images=images,
        out=out,
        backbone=backbone,
        weights=weights,
        layers=_parse_layers(layers),
        size=size,
        radius=radius,
        batch=batch,
        precision="bf16" if precision == "bf16" else "fp32",
        plans=plans,
        method=method,  # type: ignore[arg-type]  # checked by inspect_pictures
        good=good,
        bank=bank,
        extend=extend,
        share=share,
        dimensions=dimensions,
        shrinkage=shrinkage,
    )
    with StageProgress(Console(stderr=True)) as progress:
        result = inspect_pictures(settings, progress.update)
    if as_json:
        from planmill.inspection.outputs import summarize

        print(json.dumps(summarize(result), indent=2))
        return
    print_summary(Console(highlight=False), result)


class StageProgress:
    """A bar per stage, on standard error."""

    def __init__(self, console: Console) -> None:
        self._bars = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> "StageProgress":
        self._bars.start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._bars.stop()

    def update(self, stage: str, done: int, total: int) -> None:
        """Show that `done` of `total` is done; total 0: not known yet."""
        if stage not in self._tasks:
            self._tasks[stage] = self._bars.add_task(STAGES.get(stage, stage), total=total or None)
        self._bars.update(self._tasks[stage], completed=done, total=total or None)


def print_summary(console: Console, result: "Inspection") -> None:
    """The highest scores, what was skipped, how the plan was used, and where everything stands."""
    from planmill.inspection.outputs import shown_path

    table = Table("rank", "file", "score", "map maximum", box=None, pad_edge=False)
    for rank, picture in enumerate(result.pictures[:LISTED], 1):
        table.add_row(str(rank), escape(_printable(picture.file)), f"{picture.score:.3f}", f"{picture.raw_score:.3f}")
    console.print(table)
    if len(result.pictures) > LISTED:
        console.print(f"[dim]and {len(result.pictures) - LISTED} more with lower scores[/]")
    for entry in result.skipped:
        console.print(f"[yellow]skipped[/] {escape(_printable(entry.file))}: {escape(entry.reason)}", soft_wrap=True)
    plan, out = result.plan, shown_path(result.settings.out)
    how = f"built in {plan.build_time_s:.1f} s ({plan.why})" if plan.origin == "built" else "reused, checked again"
    console.print(
        f"plan: {escape(how)}, largest difference from the model {plan.max_abs:.2g}: {escape(shown_path(plan.path))}",
        soft_wrap=True,
    )
    console.print(
        f"{len(result.pictures)} pictures scored, {len(result.skipped)} skipped, {result.ignored} other files ignored, "
        f"{sum(result.stage_times_s.values()):.1f} s",
        soft_wrap=True,
    )
    for name in ("report.html", "scores.csv", "scores.json", "heatmaps"):
        console.print(f"wrote {escape(f'{out}/{name}')}", soft_wrap=True)


def _parse_layers(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise PlanmillError(f"--layers {text}: give zero-based block numbers with commas between, e.g. 2,5,8,11")
    return tuple(int(part) for part in parts)


def _printable(name: str) -> str:
    """Control characters of a file name as escapes: a name must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)
