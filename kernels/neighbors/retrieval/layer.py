"""Retriever: labelled features, and the classes that their neighbours vote for."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from planmill.kernels.common.checks import check_alike, check_choice, check_float, check_rank
from planmill.kernels.neighbors.knn.op import MAX_K, find_neighbors
from planmill.kernels.neighbors.retrieval.file import read_retriever, write_retriever
from planmill.kernels.neighbors.retrieval.vote import WEIGHTS, vote_by_class

METRICS = ("cosine", "l2")


class Retrieved(NamedTuple):
    """The k stored rows nearest to each vector, nearest first; -inf, -1 and -1 where fewer match.

    Args:
        similarities: [..., k] float32: cosine, or minus the distance.
        rows: [..., k] int32.
        labels: [..., k] int32.
    """

    similarities: torch.Tensor
    rows: torch.Tensor
    labels: torch.Tensor


class Retriever(nn.Module):
    """Training-free classification: labelled features are stored, the nearest of them vote.

    Args:
        features: [M, D] with M and D at least 1, float32, bfloat16 or float16; kept as they come.
        labels: [M], int32 or int64, 0 to C - 1.
        classes: C; None: one more than the highest label.
        k: rows that vote, 1 to 1024; where fewer are stored, all of them.
        metric: "cosine", of which lengths do not matter, or "l2".
        weights: of the votes: "plain", "similarity" (with "cosine" alone) or "softmax"; see `vote_by_class`.
        temperature: of "softmax"; in units of a similarity.
        extractor: names what computed the features; a saved retriever keeps it.

    Shapes: features [..., D] -> shares of the votes [..., C] float32. A vector that holds NaN or infinity matches
        nothing, and its shares are 0.

    Raises:
        ValueError: wrong shapes, a label outside 0 to C - 1, settings out of range; on call another width or device.
        TypeError: another dtype; on call another than that of the stored features.

    Source: nearest-neighbour voting as in `vote_by_class`, for training-free few-shot classification.
    """

    features: torch.Tensor
    labels: torch.Tensor

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        *,
        classes: int | None = None,
        k: int = 1,
        metric: str = "cosine",
        weights: str = "plain",
        temperature: float = 0.1,
        extractor: str = "",
    ) -> None:
        super().__init__()
        op = "Retriever"
        check_rank(op, "features", features, 2, "[M, D]")
        check_float(op, "features", features)
        if features.numel() == 0 or list(labels.shape) != [features.shape[0]]:
            raise ValueError(
                f"{op}: features must be [M, D] with M and D at least 1 and labels [M], got {list(features.shape)} "
                f"and {list(labels.shape)}"
            )
        if labels.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"{op}: labels must be int32 or int64, got {labels.dtype}")
        lowest, highest = int(labels.min()), int(labels.max())
        self.classes = highest + 1 if classes is None else classes
        if lowest < 0 or highest >= self.classes:
            raise ValueError(f"{op}: labels must be from 0 to {self.classes - 1}, got {lowest} to {highest}")
        check_choice(op, "metric", metric, METRICS)
        check_choice(op, "weights", weights, WEIGHTS)
        if weights == "similarity" and metric != "cosine":
            raise ValueError(f'{op}: weights "similarity" need metric "cosine", got {metric!r}')
        if not 1 <= k <= MAX_K or not 0 < temperature < torch.inf:
            raise ValueError(f"{op}: needs k from 1 to {MAX_K} and a temperature above 0, got {k} and {temperature}")
        self.k, self.metric, self.weights, self.temperature = k, metric, weights, temperature
        self.extractor = extractor
        self.register_buffer("features", features.detach().contiguous())
        self.register_buffer("labels", labels.int())

    def __len__(self) -> int:
        return self.features.shape[0]

    def retrieve(self, features: torch.Tensor, k: int | None = None) -> Retrieved:
        """The k stored rows nearest to each of `features` [..., D]; ties to the lower row.

        Args:
            features: [..., D], dtype and device of the stored ones.
            k: 1 to 1024; None: the retriever's own, or all rows where fewer are stored.
        """
        op = "Retriever"
        check_alike(op, "features", features, "the stored ones", self.features)
        rows, width = self.features.shape
        if features.dim() < 1 or features.shape[-1] != width:
            raise ValueError(f"{op}: features must be [..., {width}], got {list(features.shape)}")
        count = min(self.k, rows) if k is None else k
        distances, found = find_neighbors(features.reshape(-1, width), self.features, count, self.metric)
        similarities = 1 - distances if self.metric == "cosine" else -distances
        labels = torch.where(found < 0, -1, self.labels[found.clamp_min(0).long()])
        shape = (*features.shape[:-1], count)
        return Retrieved(similarities.view(shape), found.view(shape), labels.view(shape))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Share of the votes of each class, [..., C]."""
        found = self.retrieve(features)
        return vote_by_class(
            found.similarities, found.labels, self.classes, weights=self.weights, temperature=self.temperature
        )

    def classify(self, features: torch.Tensor) -> torch.Tensor:
        """The class with the most votes [...] int32, ties to the lower class; -1 where no row has a vote."""
        best, classes = self(features).max(-1)
        return torch.where(best > 0, classes, -1).int()

    def save(self, path: str | Path) -> None:
        """Write the features, the labels and the settings as safetensors."""
        names = ("classes", "k", "metric", "weights", "temperature", "extractor")
        write_retriever(path, self.features, self.labels, {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, path: str | Path, extractor: str | None = None) -> "Retriever":
        """Read what `save` wrote.

        Args:
            path: of the file.
            extractor: what computes the features that will be classified; None: not compared.

        Raises:
            ValueError: the file is no saved Retriever, is damaged, or is of another extractor.
            FileNotFoundError: no such file.
        """
        features, labels, settings = read_retriever(path)
        if extractor is not None and extractor != settings.get("extractor"):
            raise ValueError(
                f"Retriever.load: {path} holds features of {settings.get('extractor')!r}, not of {extractor!r}: "
                "similarities between features of two extractors mean nothing"
            )
        try:
            return cls(features, labels, **settings)
        except (TypeError, ValueError) as error:
            raise ValueError(f"Retriever.load: {path} is damaged: {error}") from error

    def extra_repr(self) -> str:
        """Sizes and settings."""
        m, d = self.features.shape
        return f"rows={m}, width={d}, classes={self.classes}, k={self.k}, metric={self.metric}, weights={self.weights}"
