"""ShardedBank: a MemoryBank whose rows live in several processes or machines."""

from functools import partial
from pathlib import Path

import torch

from planmill.distributed.cluster import ANYWHERE, Placement, connect, split
from planmill.distributed.index import ShardedIndex
from planmill.distributed.shard import ExactIndex, IndexFactory
from planmill.kernels.neighbors.memory_bank.file import Manifest, check_extractor, read_header, read_slice
from planmill.kernels.neighbors.memory_bank.layer import MemoryBank, weigh_images


class ShardedBank:
    """Scores of `MemoryBank`, from rows in shards; bit for bit the same on the CPU with the exact index.

    The nearest row of each patch is found in all shards; of each image the worst patch is then weighed by rows near
    the one it matched: b of them per image travel.

    Args:
        index: of the rows, with the neighbours of each row as its table.
        manifest: of the bank.

    Shapes: features [..., P, D] -> scores [..., P] float32, image scores [...] float32.
    """

    def __init__(self, index: ShardedIndex, manifest: Manifest) -> None:
        self.index, self.manifest = index, manifest

    @classmethod
    def of(
        cls,
        bank: MemoryBank,
        *,
        shards: int | None = None,
        address: str | None = None,
        index: IndexFactory = ExactIndex,
        placement: Placement = ANYWHERE,
    ) -> "ShardedBank":
        """The shards of a bank in memory.

        Args:
            bank: with rows.
            shards, address, index, placement: as in `ShardedIndex`.

        Raises:
            ValueError: an empty bank.
            PlanmillError: as `ShardedIndex`.
        """
        if len(bank) == 0:
            raise ValueError("ShardedBank.of: the bank is empty; MemoryBank.fit makes one")
        rows = split(connect(address), "ShardedBank.of", bank.features, shards, placement.cpus)
        table = bank.neighbors.tensor_split(len(rows))
        return cls(ShardedIndex(rows, index=index, placement=placement, table=table), bank.manifest)

    @classmethod
    def load(
        cls,
        path: str | Path,
        extractor: str | None = None,
        *,
        shards: int | None = None,
        address: str | None = None,
        index: IndexFactory = ExactIndex,
        placement: Placement = ANYWHERE,
    ) -> "ShardedBank":
        """The shards of a saved bank; each is read where it is needed, so the path must lead there on every node.

        Args:
            path, extractor: as in `MemoryBank.load`.
            shards, address, index, placement: as in `ShardedIndex`.

        Raises:
            ValueError, FileNotFoundError: as `MemoryBank.load`.
            PlanmillError: as `ShardedIndex`.
        """
        path = Path(path).absolute()
        manifest, rows, _ = read_header(path)
        check_extractor(path, manifest, extractor)
        ranges = split(connect(address), "ShardedBank.load", torch.arange(rows), shards, placement.cpus)
        cuts = [(int(part[0]), int(part[-1]) + 1) for part in ranges if isinstance(part, torch.Tensor)]
        features, neighbors = (
            [partial(read_slice, path, name, first, last) for first, last in cuts] for name in ("features", "neighbors")
        )
        return cls(ShardedIndex(features, index=index, placement=placement, table=neighbors), manifest)

    def __len__(self) -> int:
        return len(self.index)

    def __call__(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scores of the patches [..., P] and of the images [...] of `features` [..., P, D].

        Raises:
            ValueError, TypeError: as `MemoryBank`.
            PlanmillError: a shard is lost for good.
        """
        if features.dim() < 2 or features.shape[-2] == 0:
            raise ValueError(f"ShardedBank: features must be [..., P, D] with P at least 1, got {list(features.shape)}")
        distances, rows = (found[..., 0] for found in self.search(features, 1))
        around = partial(self._around, min(self.manifest.reweighting, len(self)))
        return distances, weigh_images(features, distances, rows, around)

    def _around(self, count: int, rows: torch.Tensor) -> torch.Tensor | None:
        if count == 1:
            return None
        if rows.numel() == 0:
            return torch.empty(*rows.shape, count, self.index.width)
        return self.index.take("rows", self.index.take("table", rows).long())

    def search(self, features: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The k nearest rows, as `MemoryBank.search`: distances [..., k] and rows [..., k] of `features` [..., D].

        Raises:
            ValueError, TypeError: as `MemoryBank.search`.
            PlanmillError: a shard is lost for good.
        """
        if not 1 <= k <= len(self):
            raise ValueError(f"ShardedBank.search: k must be from 1 to {len(self)}, the rows of the bank, got {k}")
        found = self.index.search(features.reshape(-1, features.shape[-1]), k)
        return found[0].view(*features.shape[:-1], k), found[1].view(*features.shape[:-1], k)

    def close(self) -> None:
        """End the processes."""
        self.index.close()

    def __enter__(self) -> "ShardedBank":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
