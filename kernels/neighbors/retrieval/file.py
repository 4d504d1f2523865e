"""A retriever as a file: safetensors, with the settings in its metadata."""

import json
from pathlib import Path
from typing import Any

import torch

FORMAT = "planmill.retriever/1"


def write_retriever(path: str | Path, features: torch.Tensor, labels: torch.Tensor, settings: dict[str, Any]) -> None:
    """Write the rows; the metadata holds the format and the settings as JSON."""
    from safetensors.torch import save_file

    tensors = {"features": features.contiguous().cpu(), "labels": labels.contiguous().cpu()}
    save_file(tensors, str(path), metadata={"format": FORMAT, "settings": json.dumps(settings)})


def read_retriever(path: str | Path) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Rows, labels and settings of a file that `write_retriever` wrote.

    Raises:
        ValueError: another file, or a damaged one.
        FileNotFoundError: no such file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"Retriever.load: {path} is no saved Retriever ({FORMAT})")
            return file.get_tensor("features"), file.get_tensor("labels"), json.loads(metadata["settings"])
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"Retriever.load: {path} is no saved Retriever: {error}") from error
