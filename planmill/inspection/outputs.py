"""The files of an inspection, apart from the report: where they may go, scores.csv, scores.json, heat maps."""

import csv
import hashlib
import io
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from planmill import __version__
from planmill.errors import PlanmillError
from planmill.inspection.results import DIMENSIONS, Inspection

FORMAT = "planmill.inspection/1"
HEATMAPS = "heatmaps"
_LONGEST_NAME = 255


def check_folders(images: Path, out: Path) -> None:
    """Make the output folder, unless writing there would touch the pictures.

    Raises:
        PlanmillError: `out` lies in `images`, its heat maps would fall on the pictures, or it cannot be made.
    """
    source, target = images.resolve(), out.resolve()
    if target.is_relative_to(source) or source.is_relative_to(target / HEATMAPS):
        raise PlanmillError(f"--out {out}: lies inside the folder of pictures, which is never written to; give another")
    if out.exists() and not out.is_dir():
        raise PlanmillError(f"--out {out}: exists and is not a folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise PlanmillError(f"--out {out}: cannot be written to: {error.strerror}") from error


def heatmap_name(file: str) -> str:
    """Where the heat map of a picture goes, below the output folder: the picture's own place and name, plus .png."""
    folder, _, name = file.rpartition("/")
    if len(f"{name}.png".encode()) > _LONGEST_NAME:
        name = f"{name[:40]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return "/".join(part for part in (HEATMAPS, folder, f"{name}.png") if part)


def write_file(path: Path, data: bytes) -> None:
    """Write a file in one step: what stood there stays whole until then.

    Raises:
        PlanmillError: the folder cannot be written to.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, scratch = tempfile.mkstemp(prefix=".planmill-", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(scratch, 0o666 & ~mask)
        os.replace(scratch, path)
    except OSError as error:
        raise PlanmillError(f"{path}: cannot be written: {error.strerror}") from error


def earlier_heatmaps(out: Path) -> set[Path]:
    """The heat maps that an earlier inspection left in `out`, as its scores.json lists them."""
    path = out / "scores.json"
    if not path.is_file():
        return set()
    try:
        earlier = json.loads(path.read_text(encoding="utf-8"))
        if earlier["format"] != FORMAT:
            return set()
        listed = [out / str(picture["heatmap"]) for picture in earlier["pictures"]]
    except (OSError, ValueError, KeyError, TypeError):
        return set()  # no file of ours: nothing to tidy up
    inside = (out / HEATMAPS).resolve()
    return {file for file in listed if file.resolve().is_relative_to(inside) and file.suffix == ".png"}


def summarize(inspection: Inspection) -> dict[str, Any]:
    """Everything but pixels, as JSON: the content of scores.json, and what `--json` prints."""
    settings = inspection.settings
    return {
        "format": FORMAT,
        "planmill": __version__,
        "images": shown_path(settings.images),
        "out": shown_path(settings.out),
        "backbone": inspection.backbone,
        "plan": {
            "path": shown_path(inspection.plan.path),
            "origin": inspection.plan.origin,
            "why": inspection.plan.why,
            "precision": inspection.plan.precision,
            "max_abs": inspection.plan.max_abs,
            "build_time_s": round(inspection.plan.build_time_s, 3),
        },
        "settings": {
            "method": settings.method,
            "good": shown_path(settings.good) if settings.good else None,
            "good_pictures": inspection.good if settings.good else None,
            "bank": shown_path(settings.bank) if settings.bank else None,
            "extend": settings.extend,
            "share": settings.share,
            "dimensions": (settings.dimensions or DIMENSIONS) if settings.method == "padim" else None,
            "shrinkage": settings.shrinkage,
            "degrees": list(settings.degrees),
            "neighbors": list(settings.neighbors),
            "radius": settings.radius,
            "batch": settings.batch,
        },
        "stage_times_s": {stage: round(seconds, 3) for stage, seconds in inspection.stage_times_s.items()},
        "scale": {"low": inspection.scale[0], "high": inspection.scale[1]},
        "counts": {
            "scored": len(inspection.pictures),
            "skipped": len(inspection.skipped),
            "ignored": inspection.ignored,
        },
        "pictures": [
            {
                "rank": rank,
                "file": picture.file,
                "score": picture.score,
                "raw_score": picture.raw_score,
                "width": picture.size[0],
                "height": picture.size[1],
                "heatmap": picture.heatmap,
                "note": picture.note,
            }
            for rank, picture in enumerate(inspection.pictures, 1)
        ],
        "skipped": [{"file": entry.file, "reason": entry.reason} for entry in inspection.skipped],
    }


def shown_path(path: Path) -> str:
    """A path as text that can be encoded."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def scores_csv(summary: dict[str, Any]) -> bytes:
    """The pictures as CSV (UTF-8, RFC 4180): one header line, then one line per picture, most anomalous first."""
    text = io.StringIO(newline="")
    columns = ("rank", "file", "score", "raw_score", "width", "height", "heatmap", "note")
    writer = csv.DictWriter(text, columns)
    writer.writeheader()
    writer.writerows(summary["pictures"])
    return text.getvalue().encode()


def scores_json(summary: dict[str, Any]) -> bytes:
    """The summary as indented JSON (UTF-8)."""
    return (json.dumps(summary, indent=2, ensure_ascii=False) + "\n").encode()
