"""The self-contained HTML report: every picture, style and chart is inside the file."""

import base64
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from planmill import __version__
from planmill.inspection.methods import METHODS
from planmill.inspection.outputs import shown_path
from planmill.inspection.rendering import heatmap_layer, palette
from planmill.inspection.results import DIMENSIONS, Inspection

BINS = 24
STAGES = {
    "load": "Load the backbone",
    "read": "Read and resize the pictures",
    "plan": "Build or reuse the plan",
    "backbone": "Run the plan",
    "fit": "Fit the good pictures",
    "score": "Score",
    "write": "Write the heat maps",
}


def render_report(inspection: Inspection) -> bytes:
    """The report as UTF-8 HTML. File names are hostile input: everything is escaped but what is made here."""
    environment = Environment(
        loader=PackageLoader("planmill", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["seconds"] = format_seconds
    total = sum(inspection.stage_times_s.values())
    html = environment.get_template("report.html").render(
        version=__version__,
        folder=shown_path(inspection.settings.images),
        cards=_cards(inspection),
        method=METHODS[inspection.settings.method],
        histogram=_histogram([picture.score for picture in inspection.pictures], _highest(inspection)),
        stages=[
            {"name": STAGES[stage], "seconds": seconds, "percent": 100 * seconds / total if total else 0.0}
            for stage, seconds in inspection.stage_times_s.items()
        ],
        total=total,
        settings=_settings(inspection),
        plan=inspection.plan,
        skipped=inspection.skipped,
        ignored=inspection.ignored,
        scale=inspection.scale,
        gradient=Markup(", ".join(f"rgb({r} {g} {b})" for r, g, b in palette()[::32].tolist())),
    )
    return html.encode("utf-8", "backslashreplace")


def format_seconds(seconds: float) -> str:
    """A time for people: milliseconds below a second, minutes above two."""
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _cards(inspection: Inspection) -> list[dict[str, Any]]:
    return [
        {
            "rank": rank,
            "file": picture.file,
            "score": picture.score,
            "raw_score": picture.raw_score,
            "width": picture.size[0],
            "height": picture.size[1],
            "note": picture.note,
            "picture": _data_uri("image/jpeg", picture.thumbnail),
            "heat": _data_uri("image/webp", heatmap_layer(picture.scores, picture.size, inspection.scale)),
        }
        for rank, picture in enumerate(inspection.pictures, 1)
    ]


def _data_uri(kind: str, data: bytes) -> Markup:
    return Markup(f"data:{kind};base64,{base64.b64encode(data).decode()}")


def _highest(inspection: Inspection) -> float:
    """The right end of the histogram and of the bars beside the scores."""
    if inspection.settings.method == "mutual":
        return 1.0
    return max(max(picture.score for picture in inspection.pictures), 1e-6)


def _histogram(scores: list[float], top: float) -> dict[str, Any]:
    """Bars in a box of 480 x 120: x and height of each, and its range in words; scores from 0 to `top`."""
    counts, edges = np.histogram(scores, bins=BINS, range=(0.0, top))
    highest = int(counts.max())
    width = 480 / BINS
    bars = [
        {
            "x": index * width + 1,
            "width": width - 2,
            "height": max(120 * count / highest, 2.0) if count else 0.0,
            "count": int(count),
            "low": float(edges[index]),
            "high": float(edges[index + 1]),
        }
        for index, count in enumerate(counts.tolist())
    ]
    ticks = [{"x": quarter * 120, "text": f"{top * quarter / 4:.3g}"} for quarter in range(5)]
    return {"bars": bars, "highest": highest, "ticks": ticks, "top": top}


def _settings(inspection: Inspection) -> list[tuple[str, str]]:
    backbone, plan = inspection.backbone, inspection.plan
    rows, columns = backbone["grid"]
    layers = backbone["layers"]
    used = "built for this run" if plan.origin == "built" else "reused, and checked against the model again"
    return [
        ("Backbone", f"{backbone['name']} ({backbone['source']})"),
        ("Weights", backbone["weights"]),
        ("Layers", ", ".join(map(str, layers)) if layers else "as the factory chooses"),
        ("Input", f"{backbone['image_size'][1]} x {backbone['image_size'][0]} pixels, {columns} x {rows} patches"),
        *_method_settings(inspection),
        ("Plan", f"{shown_path(plan.path)}: {used}"),
        ("Plan against model", f"largest difference {plan.max_abs:.2g}, {plan.precision}"),
    ]


def _method_settings(inspection: Inspection) -> list[tuple[str, str]]:
    settings = inspection.settings
    if settings.bank is not None:
        made = "extended by" if settings.extend else "made of"
        good = f", {made} {inspection.good} of {shown_path(settings.good)}" if settings.good else ""
        return [("Bank", f"{shown_path(settings.bank)}{good}")]
    if settings.good is None:
        return [
            ("Neighbourhoods r", ", ".join(map(str, settings.degrees)) + " patches"),
            ("Matching radius", "whole picture" if settings.radius is None else f"{settings.radius:g} patches"),
            ("Re-scoring k", ", ".join(map(str, settings.neighbors)) + " pictures"),
        ]
    published = "Ledoit-Wolf" if settings.method == "gaussian" else "0.01 on the diagonal"
    rows = [
        ("Good pictures", f"{inspection.good} of {shown_path(settings.good)}"),
        ("Shrinkage", published if settings.shrinkage is None else f"{settings.shrinkage:g}"),
    ]
    if settings.method == "padim":
        rows.append(("Channels", f"at most {settings.dimensions or DIMENSIONS}, drawn from all layers"))
    return rows
