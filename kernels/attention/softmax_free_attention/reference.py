"""Y = Cm pinv(A) (Cm^T V), Cm and A the Gaussian kernels of queries and landmarks; no softmax, and keys are queries."""

import torch

MODES = ("newton", "solve")
HALVINGS, LARGEST_NORM = 10, 1.01  # of the starting step of the normalised form


def gaussian(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """exp(-|x_i - y_j|^2 / 2)."""
    return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square() / 2)


def softmax_free_attention_reference(
    q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor, scale: float, mode: str, iterations: int, ridge: float,
    normalize: bool, batch_coupled: bool,
) -> torch.Tensor:  # fmt: skip
    """Y [B, H, N, dv] in the dtype of v."""
    if v.numel() == 0:
        return torch.zeros_like(v, memory_format=torch.contiguous_format)
    Q, V, L = scale * q.double(), v.double(), landmarks.double()
    Cm, A = gaussian(Q, L), gaussian(L, L)  # [B, H, N, m], [B, H, m, m]
    I = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)  # noqa: E741
    sums = A.sum(-1, keepdim=True)  # [B, H, m, 1]
    D = sums.rsqrt() if normalize else torch.ones_like(sums)
    P, W = A + ridge * I, D * (Cm.mT @ V)
    if mode == "solve":
        factor, failed = torch.linalg.cholesky_ex(P)
        return (Cm @ (D * torch.cholesky_solve(W, factor.masked_fill(failed[..., None, None] != 0, torch.nan)))).to(v)
    matrix = (0, 1, 2, 3) if batch_coupled else (2, 3)
    rho = sums.amax(matrix, keepdim=True)
    alpha = (2.0 if normalize else 1.8) / rho.square()
    for _ in range(HALVINGS if normalize else 0):
        norm = (I - alpha * (P @ P)).abs().sum(2, keepdim=True).amax(matrix, keepdim=True)
        alpha = torch.where(norm > LARGEST_NORM, alpha / 2, alpha)
    pinv = alpha * P
    for _ in range(iterations):
        pinv = 2 * pinv - pinv @ P @ pinv
    return (Cm @ (D * (pinv @ W))).to(v)
