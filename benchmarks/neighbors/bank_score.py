"""bank_score against the `torch.cdist` formula. Error: largest absolute difference of a score, random patches."""

from collections.abc import Callable

import torch

from planmill.kernels.neighbors import score_against_bank
from planmill.kernels.neighbors.mutual_score.reference import interval, patch_to_image

from ..cases import Case, Draw, Peer

LOW, HIGH = 0.0, 0.3
PATCHES_CHECKED = 32


def make(images: int, stored: int, patches: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres that new and stored images share."""

    def draw_all(draw: Draw) -> tuple:
        centers = draw.centers(64, width)
        return tuple(draw.clusters(n, patches, width, centers=centers) for n in (images, stored))

    return draw_all


def _average(a: torch.Tensor) -> torch.Tensor:
    begin, end = interval(LOW, HIGH, a.shape[-1])
    return a.sort(-1).values[..., begin:end].mean(-1)


def formula(features: torch.Tensor, bank: torch.Tensor) -> torch.Tensor:
    """One cdist of each new image against the whole bank."""
    m, q, c = bank.shape
    return torch.stack([_average(torch.cdist(z, bank.view(-1, c)).view(-1, m, q).amin(2)) for z in features])


def on_float32(features: torch.Tensor, bank: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The formula in float32, on the same values where ours takes bfloat16 (the conversion is not timed)."""
    z, b = features.float(), bank.float()
    return lambda: formula(z, b)


def check(args: tuple, scores: torch.Tensor) -> float:
    """Random patches of every new image in float64, by direct differences."""
    features, bank = args
    if scores.shape != features.shape[:2] or not bool(scores.isfinite().all()):
        return torch.nan
    error = 0.0
    everywhere = torch.ones((), dtype=torch.bool, device=features.device)
    for z, score in zip(features, scores, strict=True):
        rows = torch.randperm(len(z))[:PATCHES_CHECKED].to(z.device)
        a = torch.stack([patch_to_image(z[rows].double(), other.double(), everywhere) for other in bank], 1)
        error = max(error, float((_average(a) - score[rows]).abs().max()))
    return error


CASES = [
    Case(
        op="bank_score",
        id="N1-M16-P784-C1024-clustered",
        make=make(1, 16, 784, 1024),
        small=make(1, 3, 96, 256),
        ours=lambda features, bank: score_against_bank(features, bank, LOW, HIGH),
        peers={"torch.cdist, one against all": Peer(on_float32, tolerance=1e-3)},
        check=check,
        tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-3},
        flops=lambda features, bank: 2.0 * features.shape[0] * features.shape[1] * bank.numel(),
        dtypes=(torch.float32, torch.bfloat16),
        memory=True,
    )
]
