"""MemoryBank: PatchCore's memory, its search, and its scores."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from planmill.kernels.common.checks import check_alike
from planmill.kernels.neighbors.coreset.op import choose_coreset
from planmill.kernels.neighbors.knn.op import MAX_K, find_neighbors
from planmill.kernels.neighbors.memory_bank.file import Manifest, check_extractor, read_bank, write_bank
from planmill.kernels.neighbors.memory_bank.stream import check_rows, collect

ROWS_SEARCHED = 1024  # rows of the bank whose neighbours are looked up at a time


def nearest_rows(features: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` nearest rows of each row of `features` [M, D], itself first: [M, count] int32."""
    table = torch.empty(len(features), count, dtype=torch.int32, device=features.device)
    for first in range(0, len(features), ROWS_SEARCHED):
        rows = features[first : first + ROWS_SEARCHED]
        found = find_neighbors(rows, features, count)[1]
        own = torch.arange(first, first + len(rows), dtype=torch.int32, device=features.device)[:, None]
        # the row itself moves to the front; where copies of it fill the list, it takes the last one's place
        order = (found == own).int().argsort(dim=1, stable=True)
        table[first : first + len(rows)] = torch.cat([own, found.gather(1, order)[:, : count - 1]], 1)
    return table


def weigh_images(
    features: torch.Tensor,
    distances: torch.Tensor,
    indices: torch.Tensor,
    neighborhood: Callable[[torch.Tensor], torch.Tensor | None],
) -> torch.Tensor:
    """Scores of images [...] from their patches [..., P, D], these patches' distances and nearest rows [..., P].

    `neighborhood` gives for rows [...] (int64) the b rows [..., b, D] nearest to each, itself first; None where b is 1.
    """
    farthest = distances.argmax(-1, keepdim=True)
    score = distances.gather(-1, farthest)[..., 0]
    around = neighborhood(indices.gather(-1, farthest)[..., 0].clamp_min(0).long())
    if around is None:
        return score
    x = features.gather(-2, farthest[..., None].expand(*farthest.shape, features.shape[-1])).double()
    away = torch.linalg.vector_norm(x - around.double(), dim=-1)
    weight = 1 - away.softmax(-1)[..., 0]
    return torch.where(score < torch.inf, (weight * score).float(), score)


class MemoryBank(nn.Module):
    """Anomaly scores of patches: the distance from the nearest of a few stored patches of good images (PatchCore).

    s_p = min_m |x_p - m|.  For the image: p* = argmax_p s_p, m* the row nearest to x_p*, N the b rows of the bank
    nearest to m* (itself first): score = (1 - exp |x_p* - m*| / sum_{m in N} exp |x_p* - m|) s_p*.  The score stays
    near s_p* where m* is itself rare, far from its neighbours, and shrinks to (1 - 1/b) s_p* where it has close ones. N
    is looked up in a table that `fit` makes. With b = 1, or a single row, the score is s_p* itself.

    Args:
        features: [M, D], the stored rows; float32, bfloat16 or float16; None: an empty bank, which a state dict fills.
        reweighting: b, 1 to 1024; M where the bank holds fewer rows.
        extractor: names what computed the features, e.g. "wide_resnet50_2.layer2+layer3"; a saved bank keeps it.

    Shapes: features [..., P, D] -> scores [..., P] float32, image scores [...] float32. A patch that holds NaN or
        infinity matches nothing: its score and that of its image are inf.

    Raises:
        ValueError: `forward`, `search`: an empty bank, another width or device, an image without patches.
        TypeError: another dtype than the bank's.

    Source: Roth et al., "Towards total recall in industrial anomaly detection" (PatchCore, CVPR 2022), section 3.
    """

    features: torch.Tensor
    neighbors: torch.Tensor

    def __init__(self, features: torch.Tensor | None = None, *, reweighting: int = 9, extractor: str = "") -> None:
        super().__init__()
        if not 1 <= reweighting <= MAX_K:
            raise ValueError(f"MemoryBank: reweighting must be from 1 to {MAX_K}, got {reweighting}")
        self.manifest = Manifest(extractor=extractor, reweighting=reweighting)
        self.register_buffer("features", torch.empty(0, 0))
        self.register_buffer("neighbors", torch.empty(0, 0, dtype=torch.int32))
        if features is not None:
            check_rows("MemoryBank", features)
            if len(features) == 0:
                raise ValueError("MemoryBank: features hold no rows")
            self._keep(features.detach().contiguous())

    @property
    def extractor(self) -> str:
        """What computed the features."""
        return self.manifest.extractor

    @property
    def reweighting(self) -> int:
        """b of the formula, as asked for."""
        return self.manifest.reweighting

    def __len__(self) -> int:
        return len(self.features)

    def _keep(self, features: torch.Tensor) -> None:
        self.features = features
        self.neighbors = nearest_rows(features, min(self.reweighting, len(features)))

    @classmethod
    @torch.no_grad()
    def fit(
        cls,
        features: torch.Tensor | Iterable[torch.Tensor],
        *,
        ratio: float = 0.1,
        count: int | None = None,
        projection: int | None = None,
        seed: int = 0,
        reweighting: int = 9,
        extractor: str = "",
        budget: int | None = None,
    ) -> "MemoryBank":
        """Choose the rows of a bank from features of good images, by `choose_coreset`.

        Args:
            features: one tensor [N, D], or an iterable of tensors [n_i, D], which need not be in memory at once.
            ratio: share of the rows to keep, rounded down, at least one row.
            count: number of rows to keep instead.
            projection, seed: as in `choose_coreset`; the bank holds the rows as they came, not their projection.
            reweighting, extractor: of the bank.
            budget: rows held at once; None: all of a tensor, 65536 of an iterable. Where more come, each block of
                `budget` rows is reduced by greedy choice to 2 x ratio of itself (with `count`: it and what was kept, to
                2 x count rows), and the bank is chosen among what was kept. Where they fit, the bank is that of the
                whole; it never depends on how the rows are cut into tensors.

        Raises:
            ValueError: no rows, count above their number, ratio outside (0, 1], rows of different widths, a row that
                holds NaN or infinity.
            TypeError: dtypes that differ, or no tensors.
        """
        op = "MemoryBank.fit"
        bank = cls(reweighting=reweighting, extractor=extractor)
        rows, kept, seen = collect(op, features, ratio, count, projection, seed, budget)
        chosen = choose_coreset(rows, kept, seed=seed, projection=projection)
        bank._keep(rows.detach()[chosen.long()])
        bank.manifest = Manifest(extractor, reweighting, seed, None if count else ratio, projection, seen)
        return bank

    @torch.no_grad()
    def extend(
        self,
        features: torch.Tensor | Iterable[torch.Tensor],
        *,
        ratio: float = 0.1,
        count: int | None = None,
        seed: int = 0,
        budget: int | None = None,
    ) -> "MemoryBank":
        """Add rows of more good images: those farthest from the bank and from each other; returns self.

        Args:
            features, ratio, count, seed, budget: as in `fit`; ratio and count are of the new rows.

        Raises:
            ValueError: as `fit`, and rows of another width than the bank's.
            TypeError: as `fit`, and another dtype than the bank's.
        """
        self._check_filled("MemoryBank.extend")
        rows, kept, seen = collect("MemoryBank.extend", features, ratio, count, None, seed, budget, self.features)
        rows = rows.detach().to(self.features.device)
        distances = find_neighbors(rows, self.features, 1)[0][:, 0]
        chosen = choose_coreset(rows, kept, distances=distances)
        self._keep(torch.cat([self.features, rows[chosen.long()]]))
        self.manifest = self.manifest.extended(seen)
        return self

    def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the patches [..., P] and of the images [...] of `features` [..., P, D]."""
        op = "MemoryBank"
        if features.dim() < 2:
            raise ValueError(f"{op}: features must be [..., P, D], got {list(features.shape)}")
        if features.shape[-2] == 0:
            raise ValueError(f"{op}: features must hold at least one patch, got {list(features.shape)}")
        distances, indices = self._search(op, features, 1)
        distances, indices = distances[..., 0], indices[..., 0]
        return distances, self.weigh(features, distances, indices)

    def search(self, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows of the bank: distances [..., k] float32, nearest first, and rows [..., k] int32.

        Args:
            features: [..., D], dtype and device of the bank.
            k: 1 to the number of rows, at most 1024.

        Raises:
            ValueError: k outside its range, an empty bank, another width or device.
            TypeError: another dtype.
        """
        if features.dim() < 1:
            raise ValueError("MemoryBank.search: features must be [..., D], got []")
        return self._search("MemoryBank.search", features, k)

    def _search(self, op: str, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_filled(op)
        rows, width = self.features.shape
        check_alike(op, "features", features, "the bank", self.features)
        if features.shape[-1] != width:
            raise ValueError(f"{op}: features must be [..., {width}] like the bank, got {list(features.shape)}")
        if not 1 <= k <= min(rows, MAX_K):
            raise ValueError(f"{op}: k must be from 1 to {min(rows, MAX_K)} in a bank of {rows} rows, got {k}")
        distances, indices = find_neighbors(features.reshape(-1, width), self.features, k)
        shape = (*features.shape[:-1], k)
        return distances.view(shape), indices.view(shape)

    def weigh(self, features: torch.Tensor, distances: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Scores of images [...] from their patches [..., P, D] and what the search found for these.

        Args:
            features: [..., P, D].
            distances: [..., P] float32, from the nearest row.
            indices: [..., P] int32, that row.
        """
        return weigh_images(features, distances, indices, self._around)

    def _around(self, rows: torch.Tensor) -> torch.Tensor | None:
        return None if self.neighbors.shape[1] == 1 else self.features[self.neighbors[rows].long()]

    def _check_filled(self, op: str) -> None:
        if self.features.shape[0] == 0:
            raise ValueError(f"{op}: the bank is empty; MemoryBank.fit makes one")

    def save(self, path: str | Path) -> None:
        """Write the rows, their neighbours and the manifest as safetensors.

        Raises:
            ValueError: an empty bank.
        """
        self._check_filled("MemoryBank.save")
        write_bank(path, self.features, self.neighbors, self.manifest)

    @classmethod
    def load(cls, path: str | Path, extractor: str | None = None) -> "MemoryBank":
        """Read what `save` wrote.

        Args:
            path: of the file.
            extractor: what computes the features that will be scored; None: not compared.

        Raises:
            ValueError: the file is no saved MemoryBank, is damaged, or is of another extractor.
            FileNotFoundError: no such file.
        """
        features, neighbors, manifest = read_bank(path)
        check_extractor(path, manifest, extractor)
        bank = cls(reweighting=manifest.reweighting)
        bank.features, bank.neighbors, bank.manifest = features, neighbors, manifest
        return bank

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a bank of any size from a state dict."""
        for name in ("features", "neighbors"):
            stored = state_dict.get(prefix + name)
            if stored is not None:
                setattr(self, name, torch.empty_like(stored, device=getattr(self, name).device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """The size of the bank and its manifest."""
        rows, width = self.features.shape
        return f"rows={rows}, width={width}, reweighting={self.reweighting}, extractor={self.extractor!r}"
