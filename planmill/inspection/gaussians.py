"""Scores from Gaussians that are fitted to good pictures: one for each layer (MVG), or one for each place (PaDiM)."""

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch.nn import functional as F

from planmill.errors import PlanmillError
from planmill.inspection.results import DIMENSIONS, Settings
from planmill.kernels.moments import GaussianDetector, Moments, PositionGaussians


class PictureModel(Protocol):
    """What is fitted to good pictures and then scores others one by one."""

    def fit(self, good: Iterable[Sequence[torch.Tensor]]) -> None:
        """Fit to good pictures, batch by batch: per layer [n, P, C] float32, finite.

        Raises:
            PlanmillError: too few pictures for what is asked, or pictures that are all alike.
        """

    def score(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Distances of patches [n, P] and of whole pictures [n]; None: a picture's is the maximum of its map."""


def choose_gaussians(settings: Settings) -> PictureModel:
    """The Gaussians of the method asked for."""
    if settings.method == "gaussian":
        return LayerGaussians(settings.shrinkage)
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    return PlaceGaussians(settings.dimensions or DIMENSIONS, settings.shrinkage, dtype)


class LayerGaussians:
    """A picture is, per layer, the mean of its tokens; its score is the mean over the layers of their distances.

    The heat map cannot come from that: it is the distance of each patch from the Gaussian of all patches of the good
    pictures, wherever they are, again averaged over the layers.

    Args:
        shrinkage: of the covariances; None: the estimate of Ledoit and Wolf, as published.

    Source: Rippel et al. (ICPR 2020), section 3, on the layers that the backbone gives.
    """

    def __init__(self, shrinkage: float | None) -> None:
        self.shrinkage = shrinkage
        self._patches: list[Moments] = []
        self._means: list[list[torch.Tensor]] = []
        self._detectors: list[tuple[GaussianDetector, GaussianDetector]] = []

    def add(self, tokens: Sequence[torch.Tensor]) -> None:
        """Take a batch of good pictures."""
        if not self._patches:
            self._patches = [Moments(layer.shape[2]) for layer in tokens]
            self._means = [[] for _ in tokens]
        for layer, patches, means in zip(tokens, self._patches, self._means, strict=True):
            patches.update(layer.flatten(0, 1))
            means.append(layer.mean(1))

    def fit(self, good: Iterable[Sequence[torch.Tensor]]) -> None:
        """See PictureModel."""
        for tokens in good:
            self.add(tokens)
        for patches, means in zip(self._patches, self._means, strict=True):
            rows = torch.cat(means)
            _check_rank(len(rows), rows.shape[1], self.shrinkage)
            try:
                fitted = [GaussianDetector.fit(x, shrinkage=self.shrinkage) for x in (rows, patches)]
            except torch.linalg.LinAlgError as error:
                raise _alike(len(rows)) from error
            self._detectors.append((fitted[0], fitted[1]))
        self._means.clear()

    def score(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """See PictureModel."""
        whole, parts = [], []
        for layer, (of_picture, of_patch) in zip(tokens, self._detectors, strict=True):
            whole.append(of_picture(layer.mean(1)))
            parts.append(of_patch(layer.flatten(0, 1)).view(layer.shape[:2]))
        return torch.stack(parts).mean(0), torch.stack(whole).mean(0)


class PlaceGaussians:
    """One Gaussian for each place: of its token in all layers, in channels drawn at random, the same in every run.

    Tokens are normalised (LayerNorm without weights), so that the published constant on the diagonal of the covariances
    means the same for every backbone. A picture's score is the maximum of its map.

    Args:
        dimensions: channels drawn from those of all layers together.
        shrinkage: of the covariances towards their mean variance; None: 0.01 on their diagonal, as published.
        dtype: of the stored triangles.

    Source: Defard et al. (ICPR 2021), section 3; the published Gaussian filter of the map is left out: a bilinear map
        of patches this size is smoother than it.
    """

    def __init__(self, dimensions: int, shrinkage: float | None, dtype: torch.dtype) -> None:
        self.dimensions, self.shrinkage, self.dtype = dimensions, shrinkage, dtype
        self._gaussians: PositionGaussians | None = None

    def fit(self, good: Iterable[Sequence[torch.Tensor]]) -> None:
        """See PictureModel."""
        rows = torch.cat([self._draw(tokens) for tokens in good])
        _check_rank(rows.shape[0], rows.shape[2], self.shrinkage)
        try:
            shrunk = {} if self.shrinkage is None else {"shrinkage": self.shrinkage, "regularization": 0.0}
            self._gaussians = PositionGaussians.fit(rows, dtype=self.dtype, **shrunk)
        except torch.linalg.LinAlgError as error:
            raise _alike(len(rows)) from error

    def score(self, tokens: Sequence[torch.Tensor]) -> tuple[torch.Tensor, None]:
        """See PictureModel."""
        if self._gaussians is None:
            raise ValueError("PlaceGaussians.score: fit it first")
        return self._gaussians(self._draw(tokens)), None

    def _draw(self, tokens: Sequence[torch.Tensor]) -> torch.Tensor:
        """[n, P, d] of the layers [n, P, C]."""
        every = torch.cat([F.layer_norm(layer, layer.shape[2:]) for layer in tokens], dim=2)
        if self.dimensions >= every.shape[2]:
            return every
        drawn = torch.randperm(every.shape[2], generator=torch.Generator().manual_seed(0))[: self.dimensions]
        return every[:, :, drawn.sort().values]


def _check_rank(pictures: int, width: int, shrinkage: float | None) -> None:
    if shrinkage == 0 and pictures <= width:
        raise PlanmillError(
            f"--shrinkage 0: {pictures} good pictures are too few for a covariance of {width} channels; give more than "
            f"{width}, or shrink it: a --shrinkage above 0, or none for the published one"
        )


def _alike(pictures: int) -> PlanmillError:
    return PlanmillError(
        f"--good: the covariance of the {pictures} good pictures is singular: their features are equal in some "
        "direction; give pictures that differ, or shrink it more (--shrinkage)"
    )
