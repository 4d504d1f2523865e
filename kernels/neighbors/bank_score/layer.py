"""MutualScorer: mutual scoring as a module, with an optional bank of stored images."""

import json
from pathlib import Path

import torch
from torch import nn

from planmill.kernels.neighbors.bank_score.op import score_against_bank
from planmill.kernels.neighbors.mutual_score.op import score_mutually

FORMAT = "planmill.mutual_scorer/1"


class MutualScorer(nn.Module):
    """Anomaly scores of patches from unlabelled images (MuSc), or against a bank of stored images.

    `forward` scores a set of images against each other. `extend` stores images; `score` then scores new images against
    the stored ones without computing the bank again. The bank is a buffer: it moves with `.to()`, is in `state_dict()`,
    and grows in place.

    Args:
        low, high: the interval of nearest images to average, as in `score_mutually`.
        radius: a patch matches only patches at most this many patch widths away; None: all.
        grid: (height, width) of the patches; needed with `radius`.
        exact: float32 exact or screened, as in `score_mutually`.

    Shapes: features [N, P, C] -> scores [N, P] float32.

    Source: MuSc (Li et al., ICLR 2024), section 3.2; the bank and the radius are ours.
    """

    bank: torch.Tensor

    def __init__(
        self,
        low: float = 0.0,
        high: float = 0.3,
        *,
        radius: float | None = None,
        grid: tuple[int, int] | None = None,
        exact: bool | None = None,
    ) -> None:
        super().__init__()
        self.low, self.high, self.radius, self.exact = low, high, radius, exact
        self.grid = None if grid is None else (int(grid[0]), int(grid[1]))
        self.register_buffer("bank", torch.empty(0, 0, 0))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Score every patch of `features` [N, P, C] against the other images; [N, P]."""
        return score_mutually(features, self.low, self.high, radius=self.radius, grid=self.grid, exact=self.exact)

    @torch.no_grad()
    def extend(self, features: torch.Tensor) -> "MutualScorer":
        """Store the images `features` [N, P, C] in the bank; returns self.

        Raises:
            ValueError: patches of another number or width than the stored ones, or NaN or infinity in an image.
            TypeError: another dtype than the stored images have.
        """
        if features.dim() != 3:
            raise ValueError(f"MutualScorer.extend: features must be [N, P, C], got {list(features.shape)}")
        if not bool(features.isfinite().all()):
            raise ValueError("MutualScorer.extend: features hold NaN or infinity")
        if self.bank.shape[0] == 0:
            self.bank = features.detach().clone(memory_format=torch.contiguous_format)
            return self
        if features.shape[1:] != self.bank.shape[1:]:
            raise ValueError(
                f"MutualScorer.extend: features must be [N, {self.bank.shape[1]}, {self.bank.shape[2]}] like the bank, "
                f"got {list(features.shape)}"
            )
        if features.dtype != self.bank.dtype:
            raise TypeError(
                f"MutualScorer.extend: features must be {self.bank.dtype} like the bank, got {features.dtype}"
            )
        self.bank = torch.cat([self.bank, features.detach().to(self.bank.device)])
        return self

    def score(self, features: torch.Tensor) -> torch.Tensor:
        """Score every patch of new images `features` [N, P, C] against the stored ones; [N, P].

        Raises:
            ValueError: an empty bank.
        """
        if self.bank.shape[0] == 0:
            raise ValueError("MutualScorer.score: the bank is empty; store images with extend() first")
        return score_against_bank(
            features, self.bank, self.low, self.high, radius=self.radius, grid=self.grid, exact=self.exact
        )

    def save(self, path: str | Path) -> None:
        """Write the bank and the settings as safetensors."""
        from safetensors.torch import save_file

        settings = {key: getattr(self, key) for key in ("low", "high", "radius", "grid", "exact")}
        metadata = {"format": FORMAT, "settings": json.dumps(settings)}
        save_file({"bank": self.bank.contiguous().cpu()}, str(path), metadata=metadata)

    @classmethod
    def load(cls, path: str | Path) -> "MutualScorer":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is not a saved MutualScorer.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"MutualScorer.load: {path} is no saved MutualScorer ({FORMAT})")
                bank = file.get_tensor("bank")
        except SafetensorError as error:
            raise ValueError(f"MutualScorer.load: {path} is no saved MutualScorer: {error}") from error
        settings = json.loads(metadata["settings"])
        scorer = cls(**settings)
        scorer.bank = bank
        return scorer

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        """Take a bank of any size from a state dict."""
        if prefix + "bank" in state_dict:
            self.bank = self.bank.new_empty(state_dict[prefix + "bank"].shape, dtype=state_dict[prefix + "bank"].dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Settings and the size of the bank."""
        return f"low={self.low}, high={self.high}, radius={self.radius}, grid={self.grid}, bank={self.bank.shape[0]}"
