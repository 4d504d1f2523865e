"""The backbone's plan: built once, kept, and proved again before each reuse."""

import hashlib
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from planmill import __version__
from planmill.engine import TOLERANCES, DynamicDim, PlanError, Session, build
from planmill.errors import PlanmillError
from planmill.inspection.backbones import Backbone
from planmill.inspection.results import BATCH, PlanUse, Progress
from planmill.kernels import cpu_capabilities

Precision = Literal["fp32", "bf16"]
_STAGES = ("capture", "compile", "verify", "write")


def open_plan(
    backbone: Backbone, folder: Path, precision: Precision, batch: int, examples: torch.Tensor, progress: Progress
) -> tuple[Session, PlanUse]:
    """The backbone's plan from `folder`, or a new one that is then kept there.

    A kept plan is reused when weights, sizes, layers, precision and versions are the same, and only after it gave what
    the model gives on the first pictures of this run. Anything else means building again; the reason is returned.

    Args:
        backbone: the network.
        folder: where plans are kept; created, readable by the user alone.
        precision: of the plan.
        batch: pictures per call.
        examples: [n, C, H, W] float32, n >= 1: normalised pictures of this run.
        progress: told about the stage "plan".

    Raises:
        PlanmillError: the folder cannot be written to.
        PlanError: the backbone cannot become a plan, or the plan does not compute what the model computes.
    """
    _make_private(folder)
    largest = plan_batch(batch)
    path = plan_path(folder, backbone, precision, largest)
    why = "no plan for these weights and settings yet"
    if path.is_file():
        try:
            session = Session(path)
            difference = _difference(session, backbone, examples[:2], precision)
            return session, PlanUse(path, "reused", "", difference, 0.0, precision)
        except PlanError as error:
            why = f"the kept plan cannot be used: {error}"
    started = time.perf_counter()
    build(
        backbone.module,
        examples[:largest],
        path,
        precision=precision,
        dynamic=DynamicDim("batch", 1, largest, largest),
        metadata={"backbone": backbone.name, "layers": list(backbone.layers or ()), "grid": list(backbone.grid)},
        progress=_staged(progress),
    )
    session = Session(path)
    worst = max(output.max_abs for output in session.plan.manifest.receipt.outputs)
    return session, PlanUse(path, "built", why, worst, time.perf_counter() - started, precision)


def plan_batch(batch: int) -> int:
    """The plan's largest batch for a batch size: 8, or the next multiple of 32, so that few sizes need few plans."""
    return BATCH if batch <= BATCH else (batch + 31) // 32 * 32


def plan_path(folder: Path, backbone: Backbone, precision: Precision, largest: int) -> Path:
    """Where the plan is kept: the backbone's name and the digest of all that the plan depends on."""
    return folder / f"{_slug(backbone.name)}-{plan_key(backbone, precision, largest)[:16]}.plan"


def plan_key(backbone: Backbone, precision: Precision, largest: int) -> str:
    """Digest of all that a plan depends on: the weights' bytes, the sizes, the versions and the processor."""
    digest = hashlib.sha256()
    described = (
        backbone.source,
        backbone.layers,
        backbone.image_size,
        backbone.grid,
        len(backbone.mean),
        precision,
        largest,
        __version__,
        torch.__version__,
        sorted(cpu_capabilities()),
    )
    digest.update(repr(described).encode())
    add_weights(digest, backbone.module)
    return digest.hexdigest()


def add_weights(digest: "hashlib._Hash", module: torch.nn.Module) -> None:
    """Names, dtypes, shapes and bytes of all weights and buffers, into the digest."""
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


@torch.no_grad()
def _difference(session: Session, backbone: Backbone, pictures: torch.Tensor, precision: Precision) -> float:
    """Largest absolute difference of the plan from the model on `pictures`.

    Raises:
        PlanError: another number or shape of outputs, or out of the tolerance of the precision.
    """
    tokens, descriptor = backbone.module(pictures)
    got, wanted = session(pictures), [*tokens, descriptor]
    if not isinstance(got, tuple) or [g.shape for g in got] != [w.shape for w in wanted]:
        raise PlanError("its outputs have other shapes than the model's")
    worst = 0.0
    for g, w in zip(got, wanted, strict=True):
        difference, scale = float((g - w).abs().max()), float(w.abs().max())
        if not difference <= TOLERANCES[precision].max_rel * scale:
            raise PlanError(f"it is off the model by {difference:.3g} on these pictures")
        worst = max(worst, difference)
    return worst


def _staged(progress: Progress) -> Callable[[str, float], None]:
    def report(stage: str, fraction: float) -> None:
        position = _STAGES.index(stage) + min(fraction, 1.0) if stage in _STAGES else 0.0
        progress("plan", int(position * 25), 100)

    return report


def _make_private(folder: Path) -> None:
    """A plan holds native code, so nobody else may put one here."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PlanmillError(
            f"plans cannot be kept in {folder}: {error.strerror}; give a folder with --plans FOLDER"
        ) from error


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", name)[-48:].strip("-") or "backbone"
