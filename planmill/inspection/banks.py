"""Scores against a stored bank of patches of good pictures (PatchCore): fitted, extended, kept as a file."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError

from planmill.errors import PlanmillError
from planmill.inspection.backbones import Backbone
from planmill.inspection.plans import add_weights
from planmill.inspection.results import Settings
from planmill.kernels.neighbors import MemoryBank, pool_neighborhood

WINDOW = 3  # patches that a row is the mean of, in each direction
SHARE = 0.1  # of the good pictures' patches that a bank keeps


class BankOfPatches:
    """A row is a patch with its neighbours, of all layers; a picture's score is the bank's.

    Args:
        settings: `bank` names the file; `good` pictures make it, or with `extend` are added to it.
        backbone: whose features the bank holds.

    Raises:
        PlanmillError: the file is no bank, is of another backbone, or stands where a new bank should go.

    Source: Roth et al. (PatchCore, CVPR 2022), section 3; rows are pooled over 3 x 3 patches as there, and scaled to
        unit length per layer as in MuSc, so that no layer outweighs another.
    """

    def __init__(self, settings: Settings, backbone: Backbone) -> None:
        if settings.bank is None:
            raise ValueError("BankOfPatches: settings name no bank")
        self.path, self.share, self.grid = settings.bank, settings.share or SHARE, backbone.grid
        self.dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
        self.extractor = name_extractor(backbone, settings.precision)
        self._bank = _load(self.path, self.extractor) if stored(settings) else None
        if self._bank is None:
            _check_place(self.path)

    def fit(self, good: Iterable[Sequence[torch.Tensor]]) -> None:
        """Make the bank, or add to it, and write the file; see PictureModel."""
        rows = self._rows_of(good)
        if self._bank is None:
            self._bank = MemoryBank.fit(rows, ratio=self.share, extractor=self.extractor)
        else:
            self._bank.extend(rows, ratio=self.share)
        scratch = self.path.with_name(f".{self.path.name}.partial")
        try:
            self._bank.save(scratch)
            scratch.replace(self.path)
        except (OSError, SafetensorError) as error:
            raise PlanmillError(f"--bank {self.path}: cannot be written: {error}") from error
        finally:
            scratch.unlink(missing_ok=True)

    def score(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See PictureModel."""
        if self._bank is None:
            raise ValueError("BankOfPatches.score: fit it first")
        patches, pictures = self._bank(self._pool(tokens))
        return patches, pictures

    def _rows_of(self, good: Iterable[Sequence[torch.Tensor]]) -> Iterator[torch.Tensor]:
        for tokens in good:
            yield self._pool(tokens).flatten(0, 1)

    def _pool(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, P, sum of C] of the layers [n, P, C]."""
        return torch.cat([pool_neighborhood(layer, self.grid, WINDOW) for layer in tokens], 2).to(self.dtype)


def stored(settings: Settings) -> bool:
    """Whether an existing bank is used: it is extended, or only scored against."""
    return settings.bank is not None and (settings.extend or settings.good is None)


def name_extractor(backbone: Backbone, precision: str) -> str:
    """What computes the rows of a bank; another name means that its distances mean nothing here."""
    digest = hashlib.sha256()
    add_weights(digest, backbone.module)
    layers = "default" if backbone.layers is None else ",".join(map(str, backbone.layers))
    height, width = backbone.image_size
    facts = f"layers={layers} size={height}x{width} {precision} weights={digest.hexdigest()[:16]}"
    return f"{Path(backbone.name).name} {facts}"


def _load(path: Path, extractor: str) -> MemoryBank:
    try:
        return MemoryBank.load(path, extractor=extractor)
    except FileNotFoundError:
        raise PlanmillError(f"--bank {path}: no such file; --good FOLDER without --extend makes one") from None
    except (ValueError, OSError) as error:
        raise PlanmillError(f"--bank {path}: {error}") from error


def _check_place(path: Path) -> None:
    if path.exists():
        raise PlanmillError(
            f"--bank {path}: exists; leave out --good to score against it, or add the good pictures with --extend"
        )
    if not path.parent.is_dir():
        raise PlanmillError(f"--bank {path}: no folder {path.parent}; create it first")
