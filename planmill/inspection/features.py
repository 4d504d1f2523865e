"""Run the plan over all pictures; features go to memory, or to a file where they are many."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

from planmill.engine import Session
from planmill.errors import PlanmillError
from planmill.inspection.backbones import Backbone
from planmill.inspection.pictures import Picture
from planmill.inspection.results import Progress

IN_MEMORY_BYTES = 4 << 30


def run_plan(
    session: Session, backbone: Backbone, pictures: list[Picture], batch: int, stage: str, progress: Progress
) -> Iterator[tuple[int, list[torch.Tensor], torch.Tensor]]:
    """Batch by batch: the index of its first picture, patch tokens per layer [n, P, C], descriptors [n, E]; float32."""
    for start in range(0, len(pictures), batch):
        progress(stage, start, len(pictures))
        pixels = torch.stack([torch.from_numpy(p.pixels) for p in pictures[start : start + batch]])
        *tokens, descriptor = session(backbone.normalize(pixels))
        yield start, tokens, descriptor
    progress(stage, len(pictures), len(pictures))


def extract_features(
    session: Session, backbone: Backbone, pictures: list[Picture], batch: int, scratch: Path, progress: Progress
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Patch features per layer [N, P, C] float32 and descriptors [N, E] float32.

    Above 4 GiB the features of each layer are a memory-mapped file in the folder `scratch`.
    """
    layers: list[torch.Tensor] = []
    descriptors: list[torch.Tensor] = []
    for start, tokens, descriptor in run_plan(session, backbone, pictures, batch, "backbone", progress):
        if not layers:
            layers = _allocate(tokens, len(pictures), scratch)
        for kept, new in zip(layers, tokens, strict=True):
            kept[start : start + len(new)] = new
        descriptors.append(descriptor)
    return layers, torch.cat(descriptors)


def finite_pictures(layers: list[torch.Tensor], descriptors: torch.Tensor) -> torch.Tensor:
    """[N] bool: pictures whose features hold neither NaN nor infinity."""
    finite = descriptors.isfinite().all(1)
    for layer in layers:
        finite &= torch.stack([one.isfinite().all() for one in layer])
    return finite


def _allocate(tokens: list[torch.Tensor], count: int, scratch: Path) -> list[torch.Tensor]:
    """Room for `count` pictures of each layer.

    Raises:
        PlanmillError: the disk is too full for the file.
    """
    shapes = [(count, *layer.shape[1:]) for layer in tokens]
    total = sum(count * layer[0].numel() * 4 for layer in tokens)
    if total <= IN_MEMORY_BYTES:
        return [torch.empty(shape) for shape in shapes]
    free = shutil.disk_usage(scratch).free
    if total > free:
        raise PlanmillError(
            f"the features of {count} pictures need {total / 2**30:.1f} GiB in {scratch.parent}, where "
            f"{free / 2**30:.1f} GiB are free: use fewer --layers, a smaller --size, or another --out"
        )
    return [
        torch.from_file(str(scratch / f"{index}.bin"), shared=True, size=count * layer[0].numel()).view(shape)
        for index, (layer, shape) in enumerate(zip(tokens, shapes, strict=True))
    ]
