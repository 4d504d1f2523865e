"""mutual_matching against `torch.mm` and two arg-max, the formula that holds the whole matrix.

Error: of random rows and columns against float64, how much less similar the neighbour found is than the true one
(0: the same neighbours), in units of the cosine.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import match_mutually

from ..cases import Case, Draw, Goal, Peer

ROWS_CHECKED = 64
SIDE, WIDTH = 60, 1536  # SD and DINOv2 features of an image, side by side


def clustered(rows: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres that both maps share: 56 rows of each map are about equally near."""

    def make(draw: Draw) -> tuple:
        centers = draw.centers(64, width)
        return tuple(draw.clusters(rows, width, centers=centers) for _ in range(2))

    return make


def moved(side: int, width: int) -> Callable[[Draw], tuple]:
    """A smooth map of side x side patches, and the same upside down with noise of its own: neighbours are alike."""

    def make(draw: Draw) -> tuple:
        field = torch.randn(1, width, max(side // 4, 2), max(side // 4, 2), generator=draw.generator)
        smooth = torch.nn.functional.interpolate(field, size=(side, side), mode="bicubic")[0].flatten(1).T
        noisy = (x + 0.3 * torch.randn(side * side, width, generator=draw.generator) for x in (smooth, smooth.flip(0)))
        return tuple(torch.nn.functional.normalize(x, dim=1).to(draw.dtype).to(draw.device) for x in noisy)

    return make


def matrix(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The n x m matrix, then the arg-max of its rows and of its columns."""
    similarity = torch.mm(a, b.T)
    return similarity.argmax(1), similarity.argmax(0)


def on_float32(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any]:
    """In float32, on the same values where ours takes bfloat16 (the conversion is not timed).

    Rows rounded to bfloat16 are of unit length to 1e-4 only, which decides between the neighbours of a cluster:
    products are cosines where the rows are brought to length one again. What is left is the rounding of the sums, 1e-6.
    """
    x, y = (torch.nn.functional.normalize(z.float(), dim=1) for z in (a, b))
    return lambda: matrix(x, y)


def on_bfloat16(a: torch.Tensor, b: torch.Tensor) -> Callable[[], Any]:
    """In bfloat16, whose products are rounded to 8 bits: fast where processors have them, often wrong."""
    x, y = a.bfloat16(), b.bfloat16()
    return lambda: matrix(x, y)


def check(args: tuple, found: Any) -> float:
    """Random rows and columns."""
    a, b = args
    nearest, back = (found.nearest, found.nearest_back) if hasattr(found, "nearest") else found
    error = 0.0
    for x, y, index in ((a, b, nearest), (b, a, back)):
        if index.shape != x.shape[:1] or not bool(((index >= 0) & (index < len(y))).all()):
            return torch.nan
        rows = torch.randperm(len(x))[:ROWS_CHECKED].to(x.device)
        unit, units = (torch.nn.functional.normalize(z.double(), dim=1) for z in (x[rows], y))
        similarity = unit @ units.T
        gap = similarity.amax(1) - similarity.gather(1, index[rows].long()[:, None])[:, 0]
        error = max(error, float(gap.max()))
    if hasattr(found, "indices"):
        own = torch.arange(len(a), device=a.device)
        mutual = found.nearest_back[found.nearest.long()] == own
        if not torch.equal(found.indices, torch.where(mutual, found.nearest, -1)):
            return torch.nan
    return error


MM = "torch.mm + two argmax"
ROWS = SIDE * SIDE
SHARED: dict[str, Any] = {
    "op": "mutual_matching",
    "ours": match_mutually,
    "peers": {
        MM: Peer(on_float32, tolerance=1e-5),
        f"{MM} in bfloat16": Peer(on_bfloat16, tolerance=0.05),
    },
    "check": check,
    "tolerance": {torch.float32: 1e-6, torch.bfloat16: 1e-6},
    "flops": lambda a, b: 2.0 * len(a) * b.numel(),
    "dtypes": (torch.float32, torch.bfloat16),
    "goals": (
        Goal("ratio", 2, MM, torch.float32),
        Goal("ratio", 5, MM, torch.bfloat16, needs="amx"),
        Goal("memory", 0.9 * ROWS * ROWS * 4),  # less than the matrix
    ),
    "memory": True,
}

CASES = [
    Case(id=f"n{ROWS}-m{ROWS}-D{WIDTH}-moved", make=moved(SIDE, WIDTH), small=moved(12, 256), **SHARED),
    Case(id=f"n{ROWS}-m{ROWS}-D{WIDTH}-clustered", make=clustered(ROWS, WIDTH), small=clustered(144, 256), **SHARED),
]
