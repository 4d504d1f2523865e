"""Moments: mean and covariance accumulated over batches, merged in any order."""

from pathlib import Path

import torch

from planmill.kernels.common.checks import check_float, check_rank
from planmill.kernels.moments.covariance.op import compute_moments

FORMAT = "planmill.moments/1"
FIELDS = ("count", "mean", "scatter", "third", "fourth")


class Moments:
    """Count, mean and covariance of rows that come in batches.

    `update` adds a batch, `merge` another accumulator: both in any order, to the same result within rounding. Kept are,
    in float64, the mean, the scatter matrix sum (x - mean)(x - mean)^T, and the sums of |x - mean|^2 (x - mean) and
    |x - mean|^4, from which the shrinkage of Ledoit and Wolf follows without a second pass.

    Args:
        width: d, the number of channels.
        device: where the sums are kept.

    Attributes:
        count: [] int64, rows so far.
        mean: [d] float64.
        scatter: [d, d] float64.
        third: [d] float64.
        fourth: [] float64.

    Source: Chan, Golub, LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances" (1979).
    """

    def __init__(self, width: int, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise ValueError(f"Moments: width must be at least 1, got {width}")
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.mean = torch.zeros(width, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.third = torch.zeros(width, dtype=torch.float64, device=device)
        self.fourth = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def width(self) -> int:
        """Number of channels d."""
        return self.mean.shape[0]

    @torch.no_grad()
    def update(self, x: torch.Tensor) -> "Moments":
        """Add the rows of `x` [N, d], float32, bfloat16 or float16; returns self.

        Raises:
            ValueError: wrong rank or width; NaN or infinity (the message names the row; nothing is added).
            TypeError: another dtype.
        """
        check_rank("Moments.update", "x", x, 2, "[N, d]")
        check_float("Moments.update", "x", x)
        if x.shape[1] != self.width:
            raise ValueError(f"Moments.update: x must be [N, {self.width}], got {list(x.shape)}")
        mean, rest, scatter, third, fourth = (
            moment[0].to(self.mean.device, torch.float64) for moment in compute_moments(x[None])
        )
        batch = self if int(self.count) == 0 else Moments(self.width, self.mean.device)
        batch.count = torch.full_like(self.count, x.shape[0])
        batch.mean, batch.scatter, batch.third, batch.fourth = mean + rest, scatter, third, fourth
        return self if batch is self else self.merge(batch)

    @torch.no_grad()
    def merge(self, other: "Moments") -> "Moments":
        """Add the rows that `other` has seen; returns self.

        Raises:
            ValueError: accumulators of different width.
        """
        if other.width != self.width:
            raise ValueError(f"Moments.merge: other must have width {self.width}, got {other.width}")
        if int(self.count) == 0:  # the passes below over d x d numbers would only copy
            for name in FIELDS:
                getattr(self, name).copy_(getattr(other, name))
            return self
        count = self.count + other.count
        share = other.count / count.clamp_min(1)
        delta = other.mean.to(self.mean.device) - self.mean
        mean = self.mean + delta * share
        ours = self._about(mean - self.mean)
        theirs = other._about(delta * (share - 1))
        self.scatter, self.third, self.fourth = (a + b.to(a.device) for a, b in zip(ours, theirs, strict=True))
        self.count, self.mean = count, mean
        return self

    def _about(self, h: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """scatter, third and fourth about mean + h instead of the mean.

        With y = x - mean, a = |y|^2, b = y.h, e = |h|^2: |y - h|^2 = a - 2 b + e, and sum y = 0.
        """
        h = h.to(self.mean.device)
        n, e, trace, along = self.count, h @ h, self.scatter.trace(), self.scatter @ h
        third = self.third - 2 * along - h * (trace + n * e)
        fourth = self.fourth + 4 * (h @ along) + n * e * e - 4 * (self.third @ h) + 2 * e * trace
        return self.scatter + n * torch.outer(h, h), third, fourth

    def covariance(self, correction: int = 1) -> torch.Tensor:
        """[d, d] float64: scatter / (count - correction).

        Raises:
            ValueError: no more rows than `correction`.
        """
        count = int(self.count)
        if correction < 0 or count <= correction:
            raise ValueError(f"Moments.covariance: needs more than {max(correction, 0)} rows, got {count}")
        return self.scatter / (count - correction)

    def save(self, path: str | Path) -> None:
        """Write everything as safetensors."""
        from safetensors.torch import save_file

        state = {name: getattr(self, name).contiguous().cpu() for name in FIELDS}
        save_file(state, str(path), metadata={"format": FORMAT})

    @classmethod
    def load(cls, path: str | Path) -> "Moments":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is no saved Moments.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                if (file.metadata() or {}).get("format") != FORMAT:
                    raise ValueError(f"Moments.load: {path} is no saved Moments ({FORMAT})")
                state = {name: file.get_tensor(name) for name in FIELDS}
        except SafetensorError as error:
            raise ValueError(f"Moments.load: {path} is no saved Moments: {error}") from error
        moments = cls(len(state["mean"]))
        for name, value in state.items():
            setattr(moments, name, value)
        return moments

    def __repr__(self) -> str:
        return f"Moments(width={self.width}, count={int(self.count)})"
