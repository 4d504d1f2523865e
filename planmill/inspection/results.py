"""What an inspection is asked for and what comes out of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

Progress = Callable[[str, int, int], None]
"""`progress(stage, done, total)`; total 0 where the amount of work is not known."""

DEGREES = (1, 3, 5)
NEIGHBORS = (1, 2, 3)
BATCH = 8
DIMENSIONS = 100


def default_plan_folder() -> Path:
    """Where plans are kept for the next run: `planmill/plans` in the user's cache directory."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "planmill" / "plans"


@dataclass(frozen=True)
class Settings:
    """What to inspect, and how.

    Args:
        images: the folder of pictures, searched recursively; nothing is ever written into it.
        out: where the results go.
        backbone: `digits`, a timm or transformers ViT by name, or `file.py:factory`.
        weights: a local file of weights; None: the user's cache, or what the factory does.
        layers: zero-based blocks; None: the ends of the four quarters of the network.
        size: side of the square that a picture is resized to, in pixels; None: the backbone's default.
        radius: a patch matches only patches at most this many patch widths away; None: all.
        batch: pictures per call of the plan.
        precision: of the plan and of the scoring.
        degrees: neighbourhood widths r of the pooling, in patches.
        neighbors: neighbourhood sizes k of the re-scoring, in pictures.
        plans: where plans are kept for the next run; None: the user's cache directory.
        method: "mutual" scores the pictures against each other; "gaussian" and "padim" against `good` ones; "bank"
            against the patches that a file keeps of good ones.
        good: folder of pictures without anomalies, which Gaussians are fitted to, or that a bank is made of.
        bank: the file of the bank: read, or written where `good` is given.
        extend: add the `good` pictures to the bank that stands in the file.
        share: of the good pictures' patches that go into a bank; None: 0.1.
        dimensions: channels of padim, drawn from all layers; None: 100.
        shrinkage: of the Gaussians' covariances, 0 to 1; None: as published (gaussian: the estimate of Ledoit and Wolf;
            padim: 0.01 on the diagonal).
    """

    images: Path
    out: Path
    backbone: str
    weights: Path | None = None
    layers: tuple[int, ...] | None = None
    size: int | None = None
    radius: float | None = None
    batch: int = BATCH
    precision: Literal["fp32", "bf16"] = "fp32"
    degrees: tuple[int, ...] = DEGREES
    neighbors: tuple[int, ...] = NEIGHBORS
    plans: Path | None = None
    method: Literal["mutual", "gaussian", "padim", "bank"] = "mutual"
    good: Path | None = None
    bank: Path | None = None
    extend: bool = False
    share: float | None = None
    dimensions: int | None = None
    shrinkage: float | None = None


@dataclass(frozen=True)
class SkippedPicture:
    """A picture that was left out, and why. `file` is relative to the folder, with `/`."""

    file: str
    reason: str


@dataclass(frozen=True)
class ScoredPicture:
    """One picture with its scores.

    Args:
        file: relative to the folder, with `/`; bytes that are no UTF-8 are shown as `\\xNN`.
        score: what pictures are sorted by. mutual: 0 to 1 over the set, after re-scoring by similar pictures; gaussian:
            distance of the whole picture from the good ones; padim: raw_score; bank: the bank's, re-weighted.
        raw_score: maximum of the anomaly map, in units of the distance between unit vectors (mutual), or between rows
            of one such vector per layer (bank), or of standard deviations of the good pictures (Mahalanobis distance).
        size: (width, height) in pixels, as shown (EXIF orientation applied).
        note: what was done to it, e.g. "first of 3 frames"; may be empty.
        heatmap: file of the heat map, relative to the output folder, with `/`.
        scores: [grid height, grid width] float32, the score of each patch.
        thumbnail: JPEG of the picture, small, for the report.
    """

    file: str
    score: float
    raw_score: float
    size: tuple[int, int]
    note: str
    heatmap: str
    scores: np.ndarray
    thumbnail: bytes


@dataclass(frozen=True)
class PlanUse:
    """How the backbone ran: always through a plan.

    Args:
        path: the plan file.
        origin: "built", or "reused" when the cache held it.
        why: why it was built: e.g. "no plan for these weights and settings yet".
        max_abs: largest absolute difference from the model. Built: over all cases of the receipt; reused: on the first
            pictures of this run.
        build_time_s: what building took, when it was built.
        precision: "fp32" or "bf16".
    """

    path: Path
    origin: Literal["built", "reused"]
    why: str
    max_abs: float
    build_time_s: float
    precision: str


@dataclass(frozen=True)
class Inspection:
    """The result of `inspect_pictures`.

    Args:
        settings: what was asked.
        backbone: name, source, weights, layers, image_size, grid, mean and std of the network.
        plan: how it ran.
        pictures: most anomalous first.
        skipped: pictures that were left out, each with a reason.
        ignored: number of files that are no pictures.
        stage_times_s: seconds of the stages load, read, plan, backbone (mutual) or fit (gaussian, padim), score, write.
        scale: lowest and highest patch score of the set: the ends of the colour scale.
        good: number of good pictures that were fitted.
    """

    settings: Settings
    backbone: dict[str, Any]
    plan: PlanUse
    pictures: list[ScoredPicture]
    skipped: list[SkippedPicture]
    ignored: int
    stage_times_s: dict[str, float]
    scale: tuple[float, float]
    good: int = 0
