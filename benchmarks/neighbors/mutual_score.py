"""mutual_score against the `torch.cdist` formula. Error: largest absolute difference of a score, random patches."""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.neighbors import score_mutually
from planmill.kernels.neighbors.mutual_score.reference import interval, patch_to_image

from ..cases import Case, Draw, Goal, Peer

LOW, HIGH = 0.0, 0.3
IMAGES_CHECKED, PATCHES_CHECKED = 4, 12


def gaussian(images: int, patches: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows in all directions."""
    return lambda draw: (draw.unit(images, patches, width),)


def clustered(images: int, patches: int, width: int) -> Callable[[Draw], tuple]:
    """Unit rows around 64 centres that all images share."""
    return lambda draw: (draw.clusters(images, patches, width, centers=draw.centers(64, width)),)


def _average(a: torch.Tensor) -> torch.Tensor:
    begin, end = interval(LOW, HIGH, a.shape[-1])
    return a.sort(-1).values[..., begin:end].mean(-1)


def pairwise(z: torch.Tensor) -> torch.Tensor:
    """One cdist per ordered pair of images."""
    images = range(len(z))
    return torch.stack(
        [_average(torch.stack([torch.cdist(z[i], z[j]).amin(1) for j in images if j != i], 1)) for i in images]
    )


def one_against_all(z: torch.Tensor) -> torch.Tensor:
    """The published form: one cdist of an image against all others at once."""
    n, p, c = z.shape
    scores = []
    for i in range(n):
        others = torch.cat([z[:i], z[i + 1 :]]).reshape(-1, c)
        scores.append(_average(torch.cdist(z[i], others).view(p, n - 1, p).amin(2)))
    return torch.stack(scores)


def each_pair_once(z: torch.Tensor) -> torch.Tensor:
    """One cdist per unordered pair, row and column minima of it: what a careful user writes."""
    n, p, _ = z.shape
    a = z.new_full((n, p, n), torch.inf)
    for i in range(n):
        for j in range(i):
            distance = torch.cdist(z[i], z[j])
            a[i, :, j], a[j, :, i] = distance.amin(1), distance.amin(0)
    return _average(torch.stack([a[i][:, [j for j in range(n) if j != i]] for i in range(n)]))


def on_float32(function: Callable[[torch.Tensor], torch.Tensor]) -> Peer:
    """The formula in float32, on the same values where ours takes bfloat16 (the conversion is not timed)."""

    def prepare(features: torch.Tensor) -> Callable[[], Any]:
        z = features.float()
        return lambda: function(z)

    return Peer(prepare, tolerance=1e-3)  # the formula's own rounding, sqrt(eps) near duplicates


def check(args: tuple, scores: torch.Tensor) -> float:
    """Random patches of random images against all other images, in float64 by direct differences."""
    (z,) = args
    if scores.shape != z.shape[:2] or not bool(scores.isfinite().all()):
        return torch.nan
    error = 0.0
    everywhere = torch.ones((), dtype=torch.bool, device=z.device)
    for i in torch.randperm(len(z))[:IMAGES_CHECKED].tolist():
        rows = torch.randperm(z.shape[1])[:PATCHES_CHECKED].to(z.device)
        some = z[i, rows].double()
        a = torch.stack([patch_to_image(some, z[j].double(), everywhere) for j in range(len(z)) if j != i], 1)
        error = max(error, float((_average(a) - scores[i, rows]).abs().max()))
    return error


def flops(z: torch.Tensor) -> float:
    """Each unordered pair of images once."""
    n, p, c = z.shape
    return n * (n - 1) / 2 * 2 * p * p * c


def memory_limit(images: int, patches: int, width: int, itemsize: int) -> float:
    """1.2 x (inputs + N * P * N floats)."""
    return 1.2 * (images * patches * width * itemsize + images * patches * images * 4)


PEERS = {
    "torch.cdist, pair by pair": on_float32(pairwise),
    "torch.cdist, one against all": on_float32(one_against_all),
    "torch.cdist, each pair once": on_float32(each_pair_once),
}
FORMULAS = ("torch.cdist, pair by pair", "torch.cdist, one against all")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-3}
MAIN = (8, 784, 1024)
GOALS = (
    *(Goal("ratio", 4, peer, torch.float32) for peer in FORMULAS),
    *(Goal("ratio", 12, peer, torch.bfloat16, needs="amx") for peer in FORMULAS),
    Goal("error", 1e-5, dtype=torch.float32),
    Goal("error", 2e-3, dtype=torch.bfloat16),
    Goal("memory", memory_limit(*MAIN, 4), dtype=torch.float32),
    Goal("memory", memory_limit(*MAIN, 2), dtype=torch.bfloat16),
)
SHARED: dict[str, Any] = {
    "op": "mutual_score",
    "ours": lambda z: score_mutually(z, LOW, HIGH),
    "check": check,
    "tolerance": TOLERANCE,
    "flops": flops,
}

CASES = [
    *(
        Case(
            id=f"N8-P784-C1024-{name}",
            make=kind(*MAIN),
            small=kind(3, 96, 256),
            peers=PEERS,
            dtypes=(torch.float32, torch.bfloat16),
            goals=GOALS,
            memory=True,
            **SHARED,
        )
        for name, kind in (("clustered", clustered), ("gaussian", gaussian))
    ),
    Case(
        id="N64-P1369-C1024-clustered",
        make=clustered(64, 1369, 1024),
        small=clustered(3, 96, 256),
        peers={name: PEERS[name] for name in FORMULAS[1:]},
        dtypes=(torch.bfloat16,),
        devices=("cuda",),
        goals=(Goal("gemm", 0.6, device="cuda"),),
        memory=True,
        **SHARED,
    ),
    *(
        Case(
            id=f"scaling-N{n}-P196-C384",
            make=clustered(n, 196, 384),
            peers=PEERS,
            dtypes=(torch.float32,),
            sweep=("images", n),
            **SHARED,
        )
        for n in (2, 4, 8, 16, 32)
    ),
]
