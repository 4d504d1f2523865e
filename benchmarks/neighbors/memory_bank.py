"""MemoryBank: one image scored, and a bank fitted.

Error of scoring: largest relative difference of a patch's score from float64, random patches, and of the image's.
Error of fitting: that of the choice, see coreset.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import MemoryBank, find_neighbors

from ..cases import Case, Draw, Goal, Peer
from .coreset import NORM, Timed, steps
from .coreset import check as check_choice

PATCHES_CHECKED = 32
NEIGHBOURS = 9


def image_and_bank(patches: int, rows: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres that the image and the bank share."""

    def make(draw: Draw) -> tuple:
        centers = draw.centers(64, width)
        x, bank = (draw.clusters(n, width, centers=centers) for n in (patches, rows))
        return x, MemoryBank(bank)

    return make


def weigh(x: torch.Tensor, rows: torch.Tensor, scores: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The published score of an image: the bank is searched again for the neighbours of the nearest row."""
    p = scores.argmax()
    around = torch.cdist(rows[index[p]][None], rows)[0].topk(NEIGHBOURS, largest=False).indices
    away = torch.linalg.vector_norm(x[p] - rows[around], dim=1)
    return (1 - away.softmax(0)[0]) * scores[p]


def cdist_topk(x: torch.Tensor, bank: MemoryBank) -> Callable[[], Any]:
    """The P x M matrix, its smallest entries, the published weight."""
    rows = bank.features

    def score() -> tuple[torch.Tensor, torch.Tensor]:
        found = torch.cdist(x, rows).topk(1, dim=1, largest=False)
        scores, index = found.values[:, 0], found.indices[:, 0]
        return scores, weigh(x, rows, scores, index)

    return score


def faiss_flat(x: torch.Tensor, bank: MemoryBank) -> Callable[[], Any]:
    """IndexFlatL2, and the published weight; adding the bank to the index is not timed."""
    import faiss

    rows = bank.features
    index = faiss.IndexFlatL2(rows.shape[1])
    index.add(rows.numpy())

    def score() -> tuple[torch.Tensor, torch.Tensor]:
        squares, found = (torch.from_numpy(a)[:, 0] for a in index.search(x.numpy(), 1))
        scores = squares.clamp_min(0).sqrt()
        return scores, weigh(x, rows, scores, found)

    return score


def check(args: tuple, result: tuple) -> float:
    """Random patches and the image, in float64."""
    x, bank = args
    scores, image_score = result
    z, rows = x.double(), bank.features.double()
    if scores.shape != x.shape[:1] or not bool(scores.isfinite().all()):
        return torch.nan
    some = torch.cat([scores.argmax()[None], torch.randperm(len(z), device=z.device)[:PATCHES_CHECKED]])
    true, index = torch.cdist(z[some], rows).min(1)
    error = float(((scores[some] - true).abs() / true).max())
    image = weigh(z[some[:1]], rows, true[:1], index[:1])
    return max(error, float((image_score - image).abs() / image))


def features(rows: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres, a quarter of which become the bank."""
    return lambda draw: (draw.clusters(rows, width, centers=draw.centers(64, width)), rows // 4)


def fit(x: torch.Tensor, count: int) -> Timed:
    """A bank of `count` rows with its table of neighbours, timed."""
    made: list[MemoryBank] = []

    def call() -> torch.Tensor:
        made.append(MemoryBank.fit(x, count=count))
        return made[0].features

    return Timed.of(call)


def check_fit(args: tuple, result: Timed) -> float:
    """Which rows of the features the bank holds, and whether that was the greedy choice."""
    rows = result.chosen
    if rows.dim() == 2:  # a bank; a peer gives the indices
        distances, index = find_neighbors(rows, args[0], 1)
        if bool(distances.any()):
            return torch.nan
        rows = index[:, 0]
    return check_choice(args, Timed.of(lambda: rows))


SCORED, FITTED = (784, 16384, 1024), (32768, 512)
CDIST, FAISS = "torch.cdist + topk", "FAISS IndexFlatL2"
BANK_BYTES, FITTED_BYTES = SCORED[1] * SCORED[2] * 4, FITTED[0] // 4 * FITTED[1] * 4

CASES = [
    Case(
        op="knn",
        id="patchcore-P784-M16384-D1024",
        make=image_and_bank(*SCORED),
        small=image_and_bank(96, 500, 256),
        ours=lambda x, bank: bank(x),
        peers={
            CDIST: Peer(cdist_topk, tolerance=1e-3),
            FAISS: Peer(faiss_flat, package="faiss", devices=("cpu",), tolerance=1e-3),
        },
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=lambda x, bank: 2.0 * len(x) * bank.features.numel(),
        bytes=lambda x, bank: float(x.nbytes + bank.features.nbytes),
        goals=(Goal("ratio", 3, CDIST), Goal("memory", 0.5 * BANK_BYTES)),
        memory=True,
    ),
    Case(
        op="coreset",
        id="fit-N32768-M8192-D512",
        make=features(*FITTED),
        small=features(1200, 64),
        ours=fit,
        peers={NORM: Peer(steps(lambda f, row: torch.linalg.vector_norm(f - row, dim=1)), tolerance=1e-5)},
        check=check_fit,
        tolerance={torch.float32: 1e-7},
        goals=(Goal("memory", 1.5 * FITTED_BYTES),),
        reports_ms=True,
        memory=True,
    ),
]
