"""P^-1 W by elimination, one Scan over the landmarks: P has no row to exchange, and ONNX has no Cholesky."""

import torch

from planmill.kernels.attention.softmax_free_attention.reference import gaussian, softmax_free_attention_reference
from planmill.kernels.common.portable import State, scan


def solve(p: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """P^-1 W [..., m, n] of symmetric positive definite P [..., m, m] and W [..., m, n], by Gauss and Jordan.

    NaN where a pivot is not above zero, which is where a Cholesky factorisation fails.
    """
    size = p.shape[-1]

    def step(state: State, now: State, _: State) -> tuple[State, State]:
        (rows,), (here,) = state, now  # [..., m, m + n]; [m, 1], 1 at the landmark that is eliminated
        row = (here * rows).sum(-2, keepdim=True)
        column = (rows[..., : here.shape[0]] * here[:, 0]).sum(-1, keepdim=True)
        pivot = (column * here).sum(-2, keepdim=True)
        row = row / torch.where(pivot > 0, pivot, torch.nan)
        return [torch.where(here > 0, row, rows - column * row)], [pivot[..., 0]]

    index = torch.arange(size, device=p.device)
    ones = (index[:, None] == index).to(p.dtype)[..., None]
    (found,), _ = scan(step, [torch.cat((p, w), -1)], [ones])
    return found[..., size:]


def softmax_free_attention_portable(
    q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor, scale: float, mode: str, iterations: int, ridge: float,
    normalize: bool, batch_coupled: bool,
) -> torch.Tensor:  # fmt: skip
    """See the reference; in float32."""
    if mode != "solve":
        return softmax_free_attention_reference(
            q, v, landmarks, scale, mode, iterations, ridge, normalize, batch_coupled
        )
    Q, V, L = scale * q.float(), v.float(), landmarks.float()
    Cm, A = gaussian(Q, L), gaussian(L, L)
    sums = A.sum(-1, keepdim=True)
    D = sums.rsqrt() if normalize else torch.ones_like(sums)
    index = torch.arange(A.shape[-1], device=q.device)
    P = torch.where(index[:, None] == index, A + ridge, A)
    return (Cm @ (D * solve(P, D * (Cm.mT @ V)))).to(v.dtype)
