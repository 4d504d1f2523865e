"""Mamba's selective scan, float32, as its mixer calls it (delta, B, C and the gate are transposes of rows of tokens).

Error: largest difference from float64, as a share of the largest result.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.attention import scan_selectively
from planmill.kernels.attention.selective_scan.cases import drawn
from planmill.kernels.attention.selective_scan.chunks import scan_in_chunks
from planmill.kernels.attention.selective_scan.reference import selective_scan_reference

from ..cases import Case, Draw, Peer, plain


def make(batch: int, channels: int, length: int, states: int = 16) -> Callable[[Draw], tuple]:
    """Rates, steps and values as in a trained mixer."""

    def draw_all(draw: Draw) -> tuple:
        args = drawn(draw.dtype, draw.generator, batch, channels, states, length)
        rows = [a.mT.contiguous().mT if i in (1, 3, 4, 6) else a for i, a in enumerate(args[:8])]
        return (*(a.to(draw.device) for a in rows), args[8])

    return draw_all


def steps(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor, D: torch.Tensor,
    z: torch.Tensor, delta_bias: torch.Tensor, delta_softplus: bool,
) -> torch.Tensor:  # fmt: skip
    """As mamba and transformers compute it without their kernels: all decays and inputs first, then a loop."""
    delta = F.softplus(delta + delta_bias[:, None])
    decays, inputs = torch.exp(delta[..., None] * A[:, None]), (delta * u)[..., None] * B[:, 0].mT[:, None]
    h, rows = torch.zeros_like(decays[:, :, 0]), []
    for t in range(u.shape[2]):
        h = decays[:, :, t] * h + inputs[:, :, t]
        rows.append((h @ C[:, 0, :, t, None])[..., 0])
    return (torch.stack(rows, 2) + D[:, None] * u) * F.silu(z)


def check(args: tuple, found: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> float:
    """One random sample in float64; results are y, or y and the last state."""
    y = found[0] if isinstance(found, tuple) else found
    i = int(torch.randint(len(y), ()))
    one = [a[i : i + 1].double() if a.dim() > 2 else a.double() for a in args[:8]]
    want = selective_scan_reference(*one, args[8])[0][0]
    return float((y[i].double() - want).abs().max() / want.abs().max())


CASES = [
    Case(
        op="selective_scan",
        id=f"B{batch}-Di{channels}-Ns16-L{length}",
        make=make(batch, channels, length),
        small=make(1, 8, 9),
        ours=scan_selectively,
        peers={"decays first, then a loop": Peer(plain(steps), tolerance=1e-4),
               "chunks side by side (our gradient's)": Peer(plain(scan_in_chunks), tolerance=1e-4)},
        check=check,
        tolerance={torch.float32: 2e-5},
        flops=lambda u, delta, A, *_: 9.0 * u.numel() * A.shape[1],
        memory=True,
    )
    for batch, channels, length in ((1, 384, 197), (8, 384, 197), (1, 1536, 64), (1, 384, 2048))
]  # fmt: skip
