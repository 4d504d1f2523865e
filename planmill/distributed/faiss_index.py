"""FaissIndex: an approximate index of FAISS in each shard, where reading every row no longer pays."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from planmill.distributed.index import merge
from planmill.distributed.shard import Searcher
from planmill.errors import PlanmillError
from planmill.kernels.neighbors.knn.op import distances_of

MEASURED = 1 << 24  # numbers of candidates held at a time


@dataclass(frozen=True)
class FaissIndex:
    """Builds an index of FAISS from the rows of a shard; an `IndexFactory`.

    What FAISS names is measured again from the rows, so the distances are those of float32 differences, and only rows
    can be missed. Rows that hold NaN or infinity are left out.

    Args:
        description: of FAISS's index factory: "IVF1024,Flat", "HNSW32", "IVF4096,PQ64", "Flat".
        metric: the one the index will be asked for: "l2", "l2sq", "cosine" or "dot"; graphs (HNSW) find little by
            "dot" of rows whose lengths differ.
        probes: lists of an inverted file that a query visits, or the width of an HNSW search; more find more.
        widen: candidates taken per neighbour asked for, where codes are coarse ("PQ").

    Raises:
        PlanmillError: FAISS is not installed.
    """

    description: str
    metric: str = "l2"
    probes: int = 16
    widen: int = 1

    def __call__(self, rows: torch.Tensor) -> Searcher:
        """Train on the rows and add them."""
        try:
            import faiss
        except ImportError as error:
            raise PlanmillError(f"FaissIndex needs FAISS ({error}): pip install 'planmill[bench]'") from error
        faiss.omp_set_num_threads(torch.get_num_threads())
        kept = rows.isfinite().all(1).nonzero()[:, 0]
        vectors = _prepare(rows[kept], self.metric)
        kind = faiss.METRIC_INNER_PRODUCT if self.metric in ("dot", "cosine") else faiss.METRIC_L2
        index = faiss.index_factory(rows.shape[1], self.description, kind)
        index.train(vectors)
        index.add(vectors)
        space = faiss.ParameterSpace()
        for part, name in (("IVF", "nprobe"), ("HNSW", "efSearch")):
            if any(each.startswith(part) for each in self.description.split(",")):  # behind "OPQ16," too
                space.set_index_parameter(index, name, self.probes)
        return _Search(self, index, rows, kept)


@dataclass(frozen=True)
class _Search:
    settings: FaissIndex
    index: Any
    rows: torch.Tensor
    kept: torch.Tensor

    def search(self, queries: torch.Tensor, k: int, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Searcher`."""
        if metric != self.settings.metric:
            raise ValueError(f"FaissIndex: made for {self.settings.metric!r}, asked for {metric!r}")
        usable = queries.isfinite().all(1)
        safe = torch.where(usable[:, None], queries, 0)
        _, named = self.index.search(_prepare(safe, metric), k * self.settings.widen)
        found = torch.from_numpy(named)
        rows = self.kept[found.clamp_min(0)] if len(self.kept) else torch.zeros_like(found)
        rows = torch.where((found < 0) | ~usable[:, None], -1, rows).sort(dim=1).values  # ties go to the lower row
        nothing = -torch.inf if metric == "dot" else torch.inf
        step = max(1, MEASURED // max(1, rows.shape[1] * queries.shape[1]))
        measured = [
            distances_of(q.float(), self.rows[at.clamp_min(0)].float(), metric)
            for q, at in zip(safe.split(step), rows.split(step), strict=True)
        ]
        distances = torch.where(rows < 0, nothing, torch.cat(measured))
        return merge([(distances, rows)], k, metric)


def _prepare(rows: torch.Tensor, metric: str) -> Any:
    rows = rows.float()
    return (F.normalize(rows, dim=1) if metric == "cosine" else rows).contiguous().numpy()
