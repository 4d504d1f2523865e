"""The rows that a bank is chosen from: all of them where they fit, else a choice of each block that came along."""

from collections.abc import Iterable, Iterator

import torch

from planmill.kernels.common.checks import check_float
from planmill.kernels.neighbors.coreset.op import choose_coreset

BUDGET = 65536  # rows of a stream that are held before they are reduced
SURPLUS = 2.0  # rows kept of a block, for each that the bank will have
ROWS_CHECKED = 4096  # at a time: the mask of a check is small


def check_rows(op: str, features: torch.Tensor, width: int | None = None, dtype: torch.dtype | None = None) -> None:
    """Raise unless `features` is [n, D] of a float dtype, of `width` and `dtype` where given, and finite."""
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"{op}: features must be tensors [n, D], got {type(features).__name__}")
    if features.dim() != 2 or features.shape[1] == 0:
        raise ValueError(f"{op}: features must be [n, D] with D at least 1, got {list(features.shape)}")
    check_float(op, "features", features)
    if width is not None and features.shape[1] != width:
        raise ValueError(f"{op}: features must be [n, {width}] like the rows before, got {list(features.shape)}")
    if dtype is not None and features.dtype != dtype:
        raise TypeError(f"{op}: features must be {dtype} like the rows before, got {features.dtype}")
    for first in range(0, len(features), ROWS_CHECKED):
        bad = ~features[first : first + ROWS_CHECKED].isfinite().all(1)
        if bool(bad.any()):
            raise ValueError(f"{op}: row {first + int(bad.int().argmax())} of features holds NaN or infinity")


class Candidates:
    """Collects rows; where more come than the budget holds, those held are reduced to the ones a bank may need.

    With `ratio` each block of `budget` rows is reduced by greedy choice to 2 x ratio of itself; with `count` what is
    kept and the new block together are reduced to 2 x count rows. Either way the bank is then chosen among what was
    kept: a row is at most the sum of the choices' radii away from the bank. A block ends after `budget` rows, however
    the rows arrive, so that the result does not depend on the sizes of the tensors of a stream.
    """

    def __init__(self, ratio: float, count: int | None, projection: int | None, seed: int, budget: int) -> None:
        self.ratio, self.count, self.projection, self.seed, self.budget = ratio, count, projection, seed, budget
        self.seen = 0
        self.held = 0  # rows of the block
        self.block: torch.Tensor | None = None
        self.kept: list[torch.Tensor] = []

    def add(self, features: torch.Tensor) -> None:
        """Take rows [n, D]."""
        if self.block is None:
            self.block = features.new_empty(self.budget, features.shape[1])
        self.seen += len(features)
        while len(features):
            if self.held == self.budget:
                self._reduce()
            taken = features[: self.budget - self.held]
            self.block[self.held : self.held + len(taken)] = taken
            self.held += len(taken)
            features = features[len(taken) :]

    def _reduce(self) -> None:
        rows = self._block()
        if self.count is not None:
            rows = torch.cat([*self.kept, rows])
            self.kept = []
        size = self.ratio * len(rows) if self.count is None else self.count
        size = min(len(rows), int(SURPLUS * size) + 1)
        chosen = choose_coreset(rows, size, seed=self.seed, projection=self.projection)
        self.kept.append(rows[chosen.long()])
        self.held = 0

    def rows(self) -> torch.Tensor:
        """What the bank is chosen from: all rows, where no block was full before the last row."""
        if self.kept:
            self._reduce()
            return torch.cat(self.kept)
        return self._block()

    def _block(self) -> torch.Tensor:
        return torch.empty(0, 0) if self.block is None else self.block[: self.held]


def collect(
    op: str,
    features: torch.Tensor | Iterable[torch.Tensor],
    ratio: float,
    count: int | None,
    projection: int | None,
    seed: int,
    budget: int | None,
    like: torch.Tensor | None = None,
) -> tuple[torch.Tensor, int, int]:
    """The rows to choose from, how many the bank gets of them, and how many there were.

    Raises:
        ValueError, TypeError: see `MemoryBank.fit`.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"{op}: ratio must be above 0 and at most 1, got {ratio}")
    if count is not None and count < 1:
        raise ValueError(f"{op}: count must be at least 1, got {count}")
    if budget is not None and budget < 1:
        raise ValueError(f"{op}: budget must be at least 1, got {budget}")
    width, dtype = (None, None) if like is None else (like.shape[1], like.dtype)
    if isinstance(features, torch.Tensor) and (budget is None or len(features) <= budget):
        check_rows(op, features, width, dtype)
        rows, seen = features, len(features)
    else:
        candidates = Candidates(ratio, count, projection, seed, budget or BUDGET)
        for chunk in _chunks(op, features):
            check_rows(op, chunk, width, dtype)
            width, dtype = chunk.shape[1], chunk.dtype
            candidates.add(chunk)
        rows, seen = candidates.rows(), candidates.seen
    if seen == 0:
        raise ValueError(f"{op}: features hold no rows")
    count = max(1, int(ratio * seen)) if count is None else count
    if count > seen:
        raise ValueError(f"{op}: count must be at most the {seen} rows of features, got {count}")
    return rows, count, seen


def _chunks(op: str, features: torch.Tensor | Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    if isinstance(features, torch.Tensor):
        yield features
        return
    if not isinstance(features, Iterable):
        raise TypeError(f"{op}: features must be a tensor or an iterable of tensors, got {type(features).__name__}")
    yield from features
