"""The ways of scoring, what each is called in the report, and which options belong to which."""

from dataclasses import dataclass

from planmill.errors import PlanmillError
from planmill.inspection.results import Settings


@dataclass(frozen=True)
class Method:
    """What the report says of a method.

    Args:
        lead: what was done, and what a high score means.
        scale: what the scores of the histogram are relative to.
        source: the publication.
    """

    lead: str
    scale: str
    source: str


METHODS = {
    "mutual": Method(
        "Pictures scored against each other, without training and without labels. A high score means: some part of the "
        "picture has no counterpart in the others.",
        "Scores are relative to this set: 0 is its most ordinary picture before re-scoring, 1 its strangest.",
        "MuSc, Li et al., “MuSc: Zero-Shot Industrial Anomaly Classification and Segmentation with Mutual Scoring of "
        "the Unlabeled Images”, ICLR 2024",
    ),
    "gaussian": Method(
        "Pictures scored by their distance from good ones, without training. A high score means: the picture as a "
        "whole is far from what is usual among the good ones; its heat map shows patches that are.",
        "Scores are Mahalanobis distances from the good pictures; they do not depend on the other pictures.",
        "Rippel et al., “Modeling the Distribution of Normal Data in Pre-Trained Deep Features for Anomaly Detection”, "
        "ICPR 2020",
    ),
    "padim": Method(
        "Pictures scored place by place by their distance from good ones, without training. A high score means: some "
        "place of the picture is far from what is usual there among the good ones.",
        "Scores are Mahalanobis distances from the good pictures; they do not depend on the other pictures.",
        "Defard et al., “PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization”, ICPR "
        "2021",
    ),
    "bank": Method(
        "Pictures scored patch by patch by their distance from the nearest patches that a bank keeps of good ones, "
        "without training. A high score means: some part of the picture looks like nothing in the bank.",
        "Scores are distances from the bank; they do not depend on the other pictures.",
        "Roth et al., “Towards Total Recall in Industrial Anomaly Detection” (PatchCore), CVPR 2022",
    ),
}


def check_method(settings: Settings) -> None:
    """Whether the options fit the method.

    Raises:
        PlanmillError: an unknown method, good pictures missing, an option of another method or out of range.
    """
    method = settings.method
    if method not in METHODS:
        raise PlanmillError(f"--method {method}: must be one of {', '.join(METHODS)}")
    if method == "bank":
        _check_bank(settings)
    elif method != "mutual" and settings.good is None:
        raise PlanmillError(f"--method {method} needs --good FOLDER: pictures without anomalies, to fit on")
    given = {
        "good": (settings.good, ("gaussian", "padim", "bank")),
        "bank": (settings.bank, ("bank",)),
        "extend": (settings.extend or None, ("bank",)),
        "share": (settings.share, ("bank",)),
        "shrinkage": (settings.shrinkage, ("gaussian", "padim")),
        "dimensions": (settings.dimensions, ("padim",)),
        "radius": (settings.radius, ("mutual",)),
    }
    for name, (value, methods) in given.items():
        if value is not None and method not in methods:
            raise PlanmillError(f"--{name} is an option of --method {', '.join(methods)}, not of {method}")
    if settings.shrinkage is not None and not 0 <= settings.shrinkage <= 1:
        raise PlanmillError(f"--shrinkage {settings.shrinkage:g}: must be from 0 to 1")
    if settings.dimensions is not None and settings.dimensions < 1:
        raise PlanmillError(f"--dimensions {settings.dimensions}: must be at least 1")


def _check_bank(settings: Settings) -> None:
    if settings.bank is None:
        raise PlanmillError("--method bank needs --bank FILE: the bank to score against, or with --good to make")
    if settings.extend and settings.good is None:
        raise PlanmillError("--extend needs --good FOLDER: the pictures to add to the bank")
    if settings.share is not None and not 0 < settings.share <= 1:
        raise PlanmillError(f"--share {settings.share:g}: must be above 0 and at most 1")
    if settings.share is not None and settings.good is None:
        raise PlanmillError(
            "--share is of the patches of --good that go into the bank; give --good too, or leave it out"
        )
