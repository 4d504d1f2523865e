"""What one call of a public function costs at 8 elements; `torch.add` of 8 elements for scale."""

import torch

from planmill.kernels.neighbors import find_neighbors, score_mutually

from ..cases import Case, Goal, Peer
from ..neighbors import knn, mutual_score

GOALS = (Goal("time", 6e-3),)
CALLS = 1000
_EIGHT = torch.randn(8)
PEERS = {"torch.add": Peer(lambda *args: lambda: torch.add(_EIGHT, _EIGHT), yardstick=True)}

CASES = [
    Case(
        op="call_overhead",
        id="score_mutually-2x2x2",
        make=mutual_score.gaussian(2, 2, 2),
        ours=score_mutually,
        peers=PEERS,
        check=mutual_score.check,
        tolerance={torch.float32: 1e-5},
        devices=("cpu",),
        goals=GOALS,
        calls=CALLS,
    ),
    Case(
        op="call_overhead",
        id="find_neighbors-2x2-2x2",
        make=knn.gaussian(2, 2, 2, k=1),
        ours=find_neighbors,
        peers=PEERS,
        check=knn.check,
        tolerance={torch.float32: 1e-4},
        devices=("cpu",),
        goals=GOALS,
        calls=CALLS,
    ),
]
