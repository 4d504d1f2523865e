"""The small inverse on the GPU: csrc/cuda/attention/softmax_free_inverse.cu, one CTA a head, one launch."""

import torch

from planmill.kernels.common import cuda

SOURCE = "attention/softmax_free_inverse.cu"
SHARED_BYTES = 160 << 10  # every architecture from sm_80 on that this was written for has as much (sm_80: 163 KiB)


def newton_fits(m: int) -> bool:
    """Whether Newton's four matrices have room in shared memory: m up to 100."""
    return _newton_bytes(m) <= SHARED_BYTES


def _newton_bytes(m: int) -> int:
    padded = -(-m // 4) * 4
    return 4 * (4 * padded * padded + m)


def invert_newton(
    landmarks: torch.Tensor, steps: torch.Tensor, partials: torch.Tensor, iterations: int, ridge: float,
    normalize: bool, threads: int,
) -> torch.Tensor:  # fmt: skip
    """U [B * H, m, dv] of landmarks [B * H, m, d] and W in parts, which are lost; empty steps: alpha = 1.8 / rho^2."""
    heads, splits, m, dv = partials.shape
    out = torch.empty(heads, m, dv, dtype=torch.float32, device=partials.device)
    cuda.launch(
        SOURCE, "newton_inverse", heads, threads, _newton_bytes(m), landmarks, steps, partials, out, m,
        landmarks.shape[2], dv, splits, iterations, int(normalize), int(steps.numel() > 0), ridge,
    )  # fmt: skip
    return out


def invert_by_solving(
    landmarks: torch.Tensor, partials: torch.Tensor, ridge: float, normalize: bool, threads: int
) -> torch.Tensor:
    """The same by elimination; a P that has no room in shared memory, m above 201, lies in global memory."""
    heads, splits, m, dv = partials.shape
    shared = 4 * m * (m + 1) <= SHARED_BYTES
    out = torch.empty(heads, m, dv, dtype=torch.float32, device=partials.device)
    scratch = torch.empty(0 if shared else heads * m * m, dtype=torch.float32, device=partials.device)
    cuda.launch(
        SOURCE, "solve_inverse", heads, threads, 4 * m * (m + 1 if shared else 1), landmarks, scratch, partials, out, m,
        landmarks.shape[2], dv, splits, int(normalize), int(shared), ridge,
    )  # fmt: skip
    return out
