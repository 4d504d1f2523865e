"""From a folder of pictures to scores, heat maps and a report: the steps of `planmill inspect`, in order."""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from planmill.engine import Session
from planmill.errors import PlanmillError
from planmill.inspection.backbones import Backbone, resolve_backbone
from planmill.inspection.banks import BankOfPatches
from planmill.inspection.features import extract_features, finite_pictures, run_plan
from planmill.inspection.gaussians import PictureModel, choose_gaussians
from planmill.inspection.good import check_good, find_good, match_shapes
from planmill.inspection.methods import check_method
from planmill.inspection.outputs import (
    check_folders,
    earlier_heatmaps,
    heatmap_name,
    scores_csv,
    scores_json,
    summarize,
    write_file,
)
from planmill.inspection.pictures import Picture, find_pictures, read_pictures
from planmill.inspection.plans import open_plan, plan_batch
from planmill.inspection.rendering import heatmap_png
from planmill.inspection.report import render_report
from planmill.inspection.results import (
    Inspection,
    PlanUse,
    Progress,
    ScoredPicture,
    Settings,
    SkippedPicture,
    default_plan_folder,
)
from planmill.inspection.scoring import interpolate_maps, score_patches, score_pictures

NOT_FINITE = "the backbone gives NaN or infinity for it"


class Stopwatch:
    """Seconds per stage, in the order in which the stages first began."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        """Add the time spent inside to `stage`."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def inspect_pictures(settings: Settings, progress: Progress = lambda stage, done, total: None) -> Inspection:
    """Score the pictures of a folder and write what was found to `settings.out`. Nothing is trained.

    Method "mutual", against each other: backbone plan -> neighbourhood pooling (r = 1, 3, 5) of several layers ->
    mutual scores -> mean over layers and widths -> maps -> maximum -> re-scoring by similar pictures. Methods
    "gaussian" and "padim", against the pictures of `settings.good`: backbone plan -> Gaussians of the good ones ->
    Mahalanobis distances of the others, each of which depends on no other picture. Method "bank": the same with a bank
    of the good pictures' patches, made from `settings.good` or read from a file.

    Args:
        settings: what to inspect, and how.
        progress: `progress(stage, done, total)` for the stages load, read, plan, backbone or fit, score, write.

    Returns:
        The pictures with their scores, what was skipped, times and settings. In `settings.out` stand scores.csv,
        scores.json, report.html and heatmaps/. Files of these names are replaced, heat maps of an earlier run that are
        not written again are removed, and other files are left alone.

    Raises:
        PlanmillError: no pictures, too few that can be read, options that do not fit the method, good pictures that no
            Gaussian can be fitted to, a bank of another backbone, an unknown backbone, weights that cannot be had, a
            backbone that cannot become a plan, an output folder inside the pictures or not writable.

    Source: MuSc (Li et al., ICLR 2024); Rippel et al. (ICPR 2020); PaDiM (Defard et al., ICPR 2021); PatchCore (Roth et
        al., CVPR 2022).
    """
    watch = Stopwatch()
    check_method(settings)
    paths, ignored = find_pictures(settings.images)
    if not paths:
        others = f"; it holds {ignored} other files" if ignored else ""
        raise PlanmillError(f"{settings.images}: no pictures in this folder{others}")
    good_paths: list[Path] = []
    if settings.good is not None:
        paths, good_paths = find_good(settings.good, settings.images, paths)
    with watch.time("load"):
        progress("load", 0, 0)
        backbone = resolve_backbone(settings.backbone, settings.weights, settings.layers, settings.size)
        progress("load", 1, 1)
    for folder in filter(None, (settings.images, settings.good)):
        check_folders(folder, settings.out)
    model = _choose_model(settings, backbone)
    with watch.time("read"):
        pictures, good, skipped = _read(settings, paths, good_paths, backbone, progress)
    with watch.time("plan"):
        session, plan = _open_plan(settings, backbone, pictures, progress)
    with session:
        if model is None:
            scored = _score_mutually(settings, backbone, session, pictures, skipped, watch, progress)
        else:
            if settings.good is not None:
                with watch.time("fit"):
                    good = _fit(settings, backbone, session, good, model, skipped, progress)
            with watch.time("score"):
                scored = _score_by_model(settings, backbone, session, pictures, model, skipped, progress)
    scale = (min(float(p.scores.min()) for p in scored), max(float(p.scores.max()) for p in scored))
    inspection = Inspection(
        settings, _described(backbone), plan, scored, skipped, ignored, watch.seconds, scale, len(good)
    )
    _write(inspection, watch, progress)
    return inspection


def _choose_model(settings: Settings, backbone: Backbone) -> PictureModel | None:
    """None: the pictures are scored against each other."""
    if settings.method == "mutual":
        return None
    return BankOfPatches(settings, backbone) if settings.method == "bank" else choose_gaussians(settings)


def _read(
    settings: Settings, paths: list[Path], good_paths: list[Path], backbone: Backbone, progress: Progress
) -> tuple[list[Picture], list[Picture], list[SkippedPicture]]:
    """The pictures to score, the good ones, and what was left out of either."""
    size, channels, total = backbone.image_size, len(backbone.mean), len(paths) + len(good_paths)
    pictures, skipped = read_pictures(
        paths, settings.images, size, channels, lambda stage, done, _: progress(stage, done, total)
    )
    good: list[Picture] = []
    if settings.good is not None:
        good, unfit = read_pictures(
            good_paths, settings.good, size, channels, lambda stage, done, _: progress(stage, len(paths) + done, total)
        )
        check_good(settings.good, settings.method, good, unfit)
        if settings.method == "padim":
            pictures = match_shapes(settings.good, good, pictures, skipped)
        skipped += _good_ones(unfit)
    _need_some(pictures, skipped, settings)
    return pictures, good, skipped


def _good_ones(skipped: list[SkippedPicture]) -> list[SkippedPicture]:
    return [SkippedPicture(entry.file, f"good picture: {entry.reason}") for entry in skipped]


def _need_some(pictures: list[Picture], skipped: list[SkippedPicture], settings: Settings) -> None:
    least = 2 if settings.method == "mutual" else 1
    if len(pictures) >= least:
        return
    reasons = "; ".join(f"{entry.file}: {entry.reason}" for entry in skipped[:3])
    more = f" ({reasons}{f'; and {len(skipped) - 3} more' if len(skipped) > 3 else ''})" if reasons else ""
    count = "only 1 picture" if pictures else "no picture"
    needed = ", and scoring pictures against each other needs at least 2" if settings.method == "mutual" else ""
    raise PlanmillError(f"{settings.images}: {count} can be used{needed}{more}")


def _open_plan(
    settings: Settings, backbone: Backbone, pictures: list[Picture], progress: Progress
) -> tuple[Session, PlanUse]:
    first = torch.stack([torch.from_numpy(p.pixels) for p in pictures[: plan_batch(settings.batch)]])
    progress("plan", 0, 100)
    opened = open_plan(
        backbone,
        settings.plans or default_plan_folder(),
        settings.precision,
        settings.batch,
        backbone.normalize(first),
        progress,
    )
    progress("plan", 100, 100)
    return opened


@torch.no_grad()
def _fit(
    settings: Settings,
    backbone: Backbone,
    session: Session,
    good: list[Picture],
    model: PictureModel,
    skipped: list[SkippedPicture],
    progress: Progress,
) -> list[Picture]:
    """Fit the model to the good pictures with finite features; returns these."""
    kept: list[Picture] = []

    def usable() -> Iterator[list[torch.Tensor]]:
        lost: list[Picture] = []
        for start, tokens, descriptor in run_plan(session, backbone, good, settings.batch, "fit", progress):
            finite = finite_pictures(tokens, descriptor)
            for picture, fine in zip(good[start:], finite, strict=False):
                (kept if fine else lost).append(picture)
            if finite.any():
                yield [layer[finite] for layer in tokens]
        skipped.extend(_good_ones([SkippedPicture(p.file, NOT_FINITE) for p in lost]))
        if settings.good is not None:
            check_good(settings.good, settings.method, kept, skipped)

    model.fit(usable())
    return kept


@torch.no_grad()
def _score_by_model(
    settings: Settings,
    backbone: Backbone,
    session: Session,
    pictures: list[Picture],
    model: PictureModel,
    skipped: list[SkippedPicture],
    progress: Progress,
) -> list[ScoredPicture]:
    """Run the plan and measure every picture; most anomalous first."""
    found: list[ScoredPicture] = []
    for start, tokens, descriptor in run_plan(session, backbone, pictures, settings.batch, "score", progress):
        finite = finite_pictures(tokens, descriptor)
        some = pictures[start : start + len(finite)]
        skipped += [SkippedPicture(p.file, NOT_FINITE) for p, fine in zip(some, finite, strict=True) if not fine]
        if not finite.any():
            continue
        patches, whole = model.score([layer[finite] for layer in tokens])
        maps = patches.view(-1, *backbone.grid)
        raw = interpolate_maps(maps, backbone.image_size).amax((1, 2))
        kept = [p for p, fine in zip(some, finite, strict=True) if fine]
        found += _scored(kept, raw if whole is None else whole, raw, maps)
    if not found:
        _need_some([], skipped, settings)
    return _sorted(found)


@torch.no_grad()
def _score_mutually(
    settings: Settings,
    backbone: Backbone,
    session: Session,
    pictures: list[Picture],
    skipped: list[SkippedPicture],
    watch: Stopwatch,
    progress: Progress,
) -> list[ScoredPicture]:
    """Run the plan, score patches and pictures; most anomalous first. A picture without finite features is skipped."""
    with tempfile.TemporaryDirectory(prefix=".features-", dir=settings.out) as scratch:
        with watch.time("backbone"):
            features, descriptors = extract_features(
                session, backbone, pictures, settings.batch, Path(scratch), progress
            )
            finite = finite_pictures(features, descriptors)
        if not finite.all():
            lost = [picture for picture, fine in zip(pictures, finite, strict=True) if not fine]
            skipped += [SkippedPicture(p.file, NOT_FINITE) for p in lost]
            pictures = [picture for picture, fine in zip(pictures, finite, strict=True) if fine]
            _need_some(pictures, skipped, settings)
            features, descriptors = [layer[finite] for layer in features], descriptors[finite]
        with watch.time("score"):
            dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
            patches = score_patches(features, backbone.grid, settings.degrees, settings.radius, dtype, progress)
            maps = patches.view(len(pictures), *backbone.grid)
            raw, scores = score_pictures(maps, descriptors, backbone.image_size, settings.neighbors)
    return _sorted(_scored(pictures, scores, raw, maps))


def _scored(
    pictures: list[Picture], scores: torch.Tensor, raw: torch.Tensor, maps: torch.Tensor
) -> list[ScoredPicture]:
    return [
        ScoredPicture(
            file=picture.file,
            score=float(score),
            raw_score=float(highest),
            size=picture.size,
            note=picture.note,
            heatmap=heatmap_name(picture.file),
            scores=one.float().numpy(),
            thumbnail=picture.thumbnail,
        )
        for picture, score, highest, one in zip(pictures, scores, raw, maps, strict=True)
    ]


def _sorted(found: list[ScoredPicture]) -> list[ScoredPicture]:
    return sorted(found, key=lambda picture: (-picture.score, -picture.raw_score, picture.file))


def _described(backbone: Backbone) -> dict[str, Any]:
    return {
        "name": backbone.name,
        "source": backbone.source,
        "weights": backbone.weights,
        "layers": list(backbone.layers) if backbone.layers is not None else None,
        "image_size": list(backbone.image_size),
        "grid": list(backbone.grid),
        "mean": list(backbone.mean),
        "std": list(backbone.std),
    }


def _write(inspection: Inspection, watch: Stopwatch, progress: Progress) -> None:
    """Heat maps, then the tables and the report; scores.json is last, and names what was written."""
    out, pictures = inspection.settings.out, inspection.pictures
    stale = earlier_heatmaps(out)
    with watch.time("write"):
        for index, picture in enumerate(pictures):
            progress("write", index, len(pictures))
            target = out / picture.heatmap
            stale.discard(target)
            write_file(target, heatmap_png(picture.scores, picture.size, inspection.scale))
        for path in stale:
            path.unlink(missing_ok=True)
    summary = summarize(inspection)
    write_file(out / "scores.csv", scores_csv(summary))
    write_file(out / "report.html", render_report(inspection))
    write_file(out / "scores.json", scores_json(summary))
    progress("write", len(pictures), len(pictures))
