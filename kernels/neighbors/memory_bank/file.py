"""A bank as a file: safetensors, with a manifest that says what the rows are."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from planmill.kernels.neighbors.knn.op import MAX_K

FORMAT = "planmill.memory_bank/1"
_FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Manifest:
    """What a bank was made of.

    Args:
        extractor: names what computed the features; "" where nobody said.
        reweighting: b of the image score, as asked for.
        seed, ratio, projection: of the choice; ratio is None where the number of rows was given instead.
        seen: rows that the bank was chosen from.
        metric: of the distances; "l2".
    """

    extractor: str = ""
    reweighting: int = 9
    seed: int = 0
    ratio: float | None = None
    projection: int | None = None
    seen: int = 0
    metric: str = "l2"

    def extended(self, seen: int) -> "Manifest":
        """After `seen` more rows were offered."""
        return replace(self, seen=self.seen + seen)


def write_bank(path: str | Path, features: torch.Tensor, neighbors: torch.Tensor, manifest: Manifest) -> None:
    """Write a bank; the metadata holds the format and the manifest as JSON."""
    from safetensors.torch import save_file

    tensors = {"features": features.contiguous().cpu(), "neighbors": neighbors.contiguous().cpu()}
    facts = {**asdict(manifest), "rows": features.shape[0], "width": features.shape[1]}
    save_file(tensors, str(path), metadata={"format": FORMAT, "manifest": json.dumps(facts)})


def check_extractor(path: str | Path, manifest: Manifest, extractor: str | None) -> None:
    """Whether a bank is of `extractor`; None: any will do.

    Raises:
        ValueError: it is of another one.
    """
    if extractor is not None and extractor != manifest.extractor:
        raise ValueError(
            f"MemoryBank.load: {path} holds features of {manifest.extractor!r}, not of {extractor!r}: distances "
            "between features of two extractors mean nothing"
        )


def read_header(path: str | Path) -> tuple[Manifest, int, int]:
    """Manifest, number of rows and width of a file that `write_bank` wrote; no row is read.

    Raises:
        ValueError: another file, or a damaged one.
        FileNotFoundError: no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"MemoryBank.load: {path} is no saved MemoryBank ({FORMAT})")
            shapes = [file.get_slice(name).get_shape() for name in ("features", "neighbors")]
            kinds = file.get_slice("features").get_dtype(), file.get_slice("neighbors").get_dtype()
        facts = json.loads(metadata["manifest"])
        shape = [facts.pop("rows"), facts.pop("width")]
        manifest = Manifest(**facts)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"MemoryBank.load: {path} is no saved MemoryBank: {error}") from error
    b, metric = manifest.reweighting, manifest.metric
    if not isinstance(b, int) or not 1 <= b <= MAX_K or metric != "l2" or kinds[0] not in _FLOATS:
        raise ValueError(
            f"MemoryBank.load: {path} is damaged: reweighting {b!r}, metric {metric!r}, rows of {kinds[0]}"
        )
    if shapes != [shape, [shape[0], min(b, shape[0])]] or shape[0] < 1 or kinds[1] != "I32":
        raise ValueError(f"MemoryBank.load: {path} is damaged: its tensors do not fit its manifest")
    return manifest, *shape


def read_slice(path: str | Path, name: str, first: int, last: int) -> torch.Tensor:
    """Rows [first, last) of "features" or "neighbors" of a file whose header has been read.

    Raises:
        ValueError: a neighbour is no row of the bank, or a row holds NaN or infinity.
    """
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        part = file.get_slice(name)
        rows = part.get_shape()[0]
        tensor = part[first:last]
    if name == "neighbors" and bool((tensor < 0).any() | (tensor >= rows).any()):
        raise ValueError(f"MemoryBank.load: {path} is damaged: a neighbour is no row of the bank")
    if name == "features" and not bool(tensor.isfinite().all()):
        raise ValueError(f"MemoryBank.load: {path} is damaged: a row holds NaN or infinity")
    return tensor


def read_bank(path: str | Path) -> tuple[torch.Tensor, torch.Tensor, Manifest]:
    """Rows, neighbours and manifest of a file that `write_bank` wrote.

    Raises:
        ValueError: another file, or a damaged one.
        FileNotFoundError: no such file.
    """
    manifest, rows, _ = read_header(path)
    return read_slice(path, "features", 0, rows), read_slice(path, "neighbors", 0, rows), manifest
