"""The good pictures that Gaussians are fitted to: found, kept apart from those to score, and of one shape for PaDiM."""

from pathlib import Path

from planmill.errors import PlanmillError
from planmill.inspection.pictures import Picture, find_pictures
from planmill.inspection.results import SkippedPicture

LARGEST_STRETCH = 1.02  # between aspect ratios, for rounding to whole pixels


def find_good(good: Path, images: Path, paths: list[Path]) -> tuple[list[Path], list[Path]]:
    """The pictures to score, without those that are good, and the good ones.

    Raises:
        PlanmillError: no such folder, no pictures in it, or it holds the pictures to score.
    """
    found, ignored = find_pictures(good)
    if not found:
        others = f"; it holds {ignored} other files" if ignored else ""
        raise PlanmillError(f"--good {good}: no pictures in this folder{others}")
    inside = good.resolve()
    if images.resolve().is_relative_to(inside):
        raise PlanmillError(f"--good {good}: holds the pictures to score; give a folder of good pictures only")
    return [path for path in paths if not path.resolve().is_relative_to(inside)], found


def check_good(good: Path, method: str, pictures: list[Picture], skipped: list[SkippedPicture]) -> None:
    """Whether there are enough good pictures: one for a bank, two for a covariance.

    Raises:
        PlanmillError: fewer.
    """
    needed = 1 if method == "bank" else 2
    if len(pictures) < needed:
        reasons = "; ".join(f"{entry.file}: {entry.reason}" for entry in skipped[:3])
        count = "only 1 picture" if pictures else "no picture"
        more = f" ({reasons})" if reasons else ""
        why = "" if method == "bank" else ", and a covariance needs at least 2"
        raise PlanmillError(f"--good {good}: {count} can be used{why}{more}")


def match_shapes(
    good: Path, fitted: list[Picture], pictures: list[Picture], skipped: list[SkippedPicture]
) -> list[Picture]:
    """The pictures whose aspect ratio is that of the good ones; the others go to `skipped`.

    PaDiM compares places, and a picture of another shape would show other things at them once it is a square.

    Raises:
        PlanmillError: the good pictures differ in shape among themselves.
    """
    first = fitted[0]
    for picture in fitted:
        if not _alike(first, picture):
            raise PlanmillError(
                f"--good {good}: --method padim compares places, and {first.file} ({_size(first)}) and {picture.file} "
                f"({_size(picture)}) differ in shape; give good pictures of one shape, or use --method gaussian"
            )
    kept = []
    for picture in pictures:
        if _alike(first, picture):
            kept.append(picture)
        else:
            reason = f"other shape: {_size(picture)} pixels, and the good pictures have {_size(first)}"
            skipped.append(SkippedPicture(picture.file, reason))
    return kept


def _alike(one: Picture, other: Picture) -> bool:
    stretch = one.size[0] * other.size[1] / (one.size[1] * other.size[0])
    return max(stretch, 1 / stretch) <= LARGEST_STRETCH


def _size(picture: Picture) -> str:
    return f"{picture.size[0]} x {picture.size[1]}"
