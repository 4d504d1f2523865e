"""The main job, end to end: a trained model becomes a plan, and the plan works on real digits. Run by `make demo`.

python examples/digits/demo.py [--out demo]
"""

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import data
import model as digits
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from sklearn.metrics import roc_auc_score

from planmill.engine import DynamicDim, Session, build
from planmill.inspection import Inspection, Settings, inspect_pictures

if TYPE_CHECKING:
    from planmill.engine import Plan

CONSOLE = Console(highlight=False)
BATCHES = (1, 64)
ROUNDS = 30
MEAN_EXPECTED, EACH_EXPECTED = 0.99, 0.97


def bars() -> Progress:
    """A progress bar with spinner and time."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    return Progress(*columns, console=CONSOLE, transient=True)


def build_plan(path: Path, pictures: torch.Tensor) -> "Plan":
    """Build the classifier's plan, and show its receipt."""
    with bars() as progress:
        task = progress.add_task("Building the plan", total=None)
        plan = build(
            digits.load_model(),
            pictures[:64],
            path,
            dynamic=DynamicDim("batch", 1, 8, 64),
            progress=lambda stage, fraction: progress.update(task, description=f"Building the plan: {stage}"),
        )
    manifest = plan.manifest
    table = Table(
        "output", "largest difference", "relative to scale", "cosine", title="Receipt: the plan against the model"
    )
    for output in manifest.receipt.outputs:
        table.add_row(output.name, f"{output.max_abs:.2g}", f"{output.max_rel:.2g}", f"{output.cosine:.8f}")
    CONSOLE.print(table)
    cases = ", ".join(str(case["batch"]) for case in manifest.receipt.cases)
    CONSOLE.print(f"verified at batch {cases}; built in {manifest.build_time_s:.1f} s\n")
    return plan


def median_times(model: Callable, plan: Callable, x: torch.Tensor) -> tuple[float, float]:
    """Median milliseconds of model and plan on `x`, called in turns."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(ROUNDS + 3):
        for function, kept in zip((model, plan), times, strict=True):
            started = time.perf_counter()
            function(x)
            if round_number >= 3:  # the first calls warm up
                kept.append((time.perf_counter() - started) * 1000)
    return statistics.median(times[0]), statistics.median(times[1])


@torch.inference_mode()
def compare(session: Session, pictures: torch.Tensor, labels: torch.Tensor) -> bool:
    """Classify the held-out digits with the model and with the plan; True where all predictions are equal."""
    model = digits.load_model()
    by_model = torch.cat([model(chunk).argmax(1) for chunk in pictures.split(64)])
    by_plan = torch.cat([session(chunk).argmax(1) for chunk in pictures.split(64)])  # type: ignore[union-attr]
    equal = int((by_model == by_plan).sum())
    table = Table("", "model", "plan", "model / plan", title=f"{len(labels)} held-out digits")
    accuracies = [f"{float((found == labels).float().mean()):.2%}" for found in (by_model, by_plan)]
    table.add_row("accuracy", *accuracies, "")
    table.add_row("equal predictions", "", f"{equal} of {len(labels)}", "")
    for batch in BATCHES:
        ours, theirs = median_times(model, session, pictures[:batch])
        table.add_row(f"p50 latency, batch {batch}", f"{ours:.2f} ms", f"{theirs:.2f} ms", f"{ours / theirs:.2f} x")
    CONSOLE.print(table)
    CONSOLE.print()
    return equal == len(labels)


def write_tray(folder: Path, normal: int) -> dict[str, bool]:
    """Write a tray of held-out digits as PNG files; returns which file is an intruder. Names do not give it away."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    split, intruder = data.tray(normal)
    for index, picture in enumerate(split.pictures):
        Image.fromarray(picture).save(folder / f"{index:02d}.png")
    return {f"{index:02d}.png": bool(odd) for index, odd in enumerate(intruder)}


def inspect_trays(out: Path) -> list[tuple[int, float, Inspection]]:
    """Inspect a tray per class; returns class, image AUROC and result."""
    found = []
    with bars() as progress:
        task = progress.add_task("Inspecting trays", total=10)
        for normal in range(10):
            progress.update(task, description=f"Inspecting a tray of {normal}s", completed=normal)
            intruders = write_tray(out / "trays" / str(normal), normal)
            settings = Settings(
                images=out / "trays" / str(normal),
                out=out / "inspect" / str(normal),
                backbone="digits",
                batch=64,
                plans=out / "plans",
            )
            result = inspect_pictures(settings)
            wanted = [intruders[picture.file] for picture in result.pictures]
            found.append((normal, float(roc_auc_score(wanted, [p.score for p in result.pictures])), result))
    return found


def show_trays(found: list[tuple[int, float, Inspection]]) -> bool:
    """Print the AUROC per class; True where they are what the project promises."""
    table = Table(
        "normal class", "image AUROC", "intruders in the top 8", "time", title="Trays: 60 of one class, 8 intruders"
    )
    split = {normal: data.tray(normal)[1] for normal, _, _ in found}
    for normal, auroc, result in found:
        top = sum(split[normal][int(picture.file[:2])] for picture in result.pictures[:8])
        seconds = sum(t for stage, t in result.stage_times_s.items() if stage != "plan")
        table.add_row(str(normal), f"{auroc:.4f}", f"{top} of 8", f"{seconds:.1f} s")
    mean = float(np.mean([auroc for _, auroc, _ in found]))
    lowest = min(auroc for _, auroc, _ in found)
    table.add_section()
    table.add_row("mean", f"{mean:.4f}", "", "")
    CONSOLE.print(table)
    good = mean >= MEAN_EXPECTED and lowest >= EACH_EXPECTED
    verdict = "[green]as expected[/]" if good else "[red]below what is expected[/]"
    CONSOLE.print(
        f"mean {mean:.4f} (expected {MEAN_EXPECTED} or more), lowest {lowest:.4f} (expected {EACH_EXPECTED} or more): "
        f"{verdict}\n"
    )
    return good


def main() -> int:
    """Run the demo; returns 1 where plan and model disagree or the trays score worse than expected."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for everything that is written")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    held_out = data.load()[1]
    pictures = data.to_tensor(held_out.pictures, digits.MEAN, digits.STD)
    plan = build_plan(out / "digits.plan", pictures)
    with Session(plan.path) as session:
        equal = compare(session, pictures, torch.from_numpy(held_out.labels))
    found = inspect_trays(out)
    good = show_trays(found)
    for what, path in (
        ("plan", plan.path),
        ("pictures", out / "trays"),
        ("open this report", found[8][2].settings.out / "report.html"),
        ("all reports, scores and heat maps", out / "inspect"),
    ):
        CONSOLE.print(f"{what}: {path}", soft_wrap=True)
    CONSOLE.print(f"finished in {time.perf_counter() - started:.0f} s")
    return 0 if equal and good else 1


if __name__ == "__main__":
    sys.exit(main())
