"""Search and scoring over many processes and machines: what `planmill.kernels.neighbors` does, over shards, with Ray.

Needs the extra `serve`. Distances are those of one process, bit for bit on the CPU.
"""

from planmill.distributed.bank import ShardedBank
from planmill.distributed.cluster import Placement, connect
from planmill.distributed.faiss_index import FaissIndex
from planmill.distributed.index import ShardedIndex
from planmill.distributed.mutual import score_mutually_in_shards
from planmill.distributed.shard import ExactIndex, IndexFactory, Searcher

__all__ = [
    "ExactIndex",
    "FaissIndex",
    "IndexFactory",
    "Placement",
    "Searcher",
    "ShardedBank",
    "ShardedIndex",
    "connect",
    "score_mutually_in_shards",
]
