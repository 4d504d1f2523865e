"""A bank as a file: safetensors, with a manifest that says what the rows are."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

FORMAT = "planmill.memory_bank/1"


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


def read_bank(path: str | Path) -> tuple[torch.Tensor, torch.Tensor, Manifest]:
    """Rows, neighbours and manifest of a file that `write_bank` wrote.

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
            features, neighbors = file.get_tensor("features"), file.get_tensor("neighbors")
        facts = json.loads(metadata["manifest"])
        shape = (facts.pop("rows"), facts.pop("width"))
        manifest = Manifest(**facts)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"MemoryBank.load: {path} is no saved MemoryBank: {error}") from error
    table = (shape[0], min(manifest.reweighting, shape[0]))
    if tuple(features.shape) != shape or tuple(neighbors.shape) != table or neighbors.dtype != torch.int32:
        raise ValueError(f"MemoryBank.load: {path} is damaged: its tensors do not fit its manifest")
    if bool((neighbors < 0).any() | (neighbors >= shape[0]).any()):
        raise ValueError(f"MemoryBank.load: {path} is damaged: a neighbour is no row of the bank")
    return features, neighbors, manifest
