"""matrix_root against the iteration in torch.bmm; whitening and covariance pooling against their formulas.

Error: the largest of an entry as a share of the largest entry of its image, against the same iteration in float64.
"""

from collections.abc import Callable

import torch

from planmill.kernels.moments import matrix_sqrt, pool_covariance, whiten
from planmill.kernels.moments.matrix_root.reference import matrix_root_reference

from ..cases import Case, Draw, Goal, Peer, plain

STEPS = 5


def covariances(batch: int, width: int) -> Callable[[Draw], tuple]:
    """Of twice as many rows as channels, whose deviations go from 1 to 0.1."""

    def make(draw: Draw) -> tuple:
        x = draw.normal(batch, 2 * width, width).float() * torch.logspace(0, -1, width, device=draw.device)
        return ((x.mT @ x / (2 * width)).to(draw.dtype),)

    return make


def maps(batch: int, width: int, side: int) -> Callable[[Draw], tuple]:
    """Mixed channels with a mean, as after a ReLU."""

    def make(draw: Draw) -> tuple:
        mix = draw.normal(width, width).float() / width**0.5
        x = torch.einsum("cd,bdhw->bchw", mix, draw.normal(batch, width, side, side).float()).relu()
        return (x.to(draw.dtype),)

    return make


def steps(s: torch.Tensor, inverse: bool = False) -> torch.Tensor:
    """The coupled iteration as published, 3 T - 3 products, in the dtype of `s`."""
    identity = torch.eye(s.shape[1], dtype=s.dtype, device=s.device)
    trace = s.diagonal(dim1=1, dim2=2).sum(1)[:, None, None]
    y = s / trace
    z = 1.5 * identity - 0.5 * y
    y = torch.bmm(y, z)
    for _ in range(STEPS - 2):
        m = torch.baddbmm(1.5 * identity, z, y, alpha=-0.5)
        y, z = torch.bmm(y, m), torch.bmm(m, z)
    m = torch.baddbmm(1.5 * identity, z, y, alpha=-0.5)
    return torch.bmm(m, z) * trace.rsqrt() if inverse else torch.bmm(y, m) * trace.sqrt()


def centred(x: torch.Tensor) -> torch.Tensor:
    """[B, C, HW] about the mean of each channel."""
    z = x.flatten(2)
    return z - z.mean(2, keepdim=True)


def whitened(x: torch.Tensor) -> torch.Tensor:
    """Instance whitening by batched products."""
    z = centred(x)
    s = torch.bmm(z, z.mT) / z.shape[2] + 1e-5 * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
    return torch.bmm(steps(s, inverse=True), z).view(x.shape)


def pooled(x: torch.Tensor) -> torch.Tensor:
    """iSQRT-COV by batched products."""
    z = centred(x)
    root = steps(torch.bmm(z, z.mT) / z.shape[2])
    rows, columns = torch.triu_indices(x.shape[1], x.shape[1], device=x.device).unbind()
    return root[:, rows, columns]


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Of a few images."""
    scale = want.abs().flatten(1).amax(1)
    return float(((got.double() - want).abs().flatten(1).amax(1) / scale).max())


def some(x: torch.Tensor) -> torch.Tensor:
    """Two random images."""
    return torch.randperm(len(x))[:2].to(x.device)


def check_root(args: tuple, result: torch.Tensor) -> float:
    """Roots."""
    chosen = some(args[0])
    return relative(result[chosen], matrix_root_reference(args[0][chosen], STEPS, False).double())


def check_maps(formula: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[tuple, torch.Tensor], float]:
    """Against the formula in float64."""

    def check(args: tuple, result: torch.Tensor) -> float:
        chosen = some(args[0])
        return relative(result[chosen], formula(args[0][chosen].double()))

    return check


def flops_of_root(batch: int, width: int) -> float:
    """Half of each of the 3 T - 3 products: the result is symmetric."""
    return batch * (3 * STEPS - 3) * width * width * (width + 1)


CASES = [
    *(
        Case(
            op="matrix_root",
            id=f"B{batch}-D{width}-T{STEPS}",
            make=covariances(batch, width),
            small=covariances(2, 24),
            ours=matrix_sqrt,
            peers={"torch.bmm loop": Peer(plain(steps))},
            check=check_root,
            tolerance={torch.float32: 1e-5},
            flops=lambda s: flops_of_root(*s.shape[:2]),
            goals=(Goal("ratio", 1.5),) if batch == 32 and width == 256 else (),
        )
        for batch, width in ((32, 256), (1, 256), (32, 64))
    ),
    Case(
        op="matrix_root",
        id="whiten-B8-C64-56x56",
        make=maps(8, 64, 56),
        small=maps(2, 8, 7),
        ours=whiten,
        peers={"formula": Peer(plain(whitened))},
        check=check_maps(whitened),
        tolerance={torch.float32: 1e-5},
        flops=lambda x: flops_of_root(*x.shape[:2]) + 3 * x.numel() * x.shape[1],
    ),
    Case(
        op="matrix_root",
        id="pool-B32-D256-14x14",
        make=maps(32, 256, 14),
        small=maps(2, 8, 7),
        ours=pool_covariance,
        peers={"formula": Peer(plain(pooled))},
        check=check_maps(pooled),
        tolerance={torch.float32: 1e-5},
        flops=lambda x: flops_of_root(*x.shape[:2]) + x.numel() * x.shape[1],
    ),
]
