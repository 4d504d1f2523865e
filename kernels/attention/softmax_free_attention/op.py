"""softmax_free_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.softmax_free_attention.cases import cases
from planmill.kernels.attention.softmax_free_attention.reference import MODES, softmax_free_attention_reference
from planmill.kernels.common.checks import check_alike, check_choice, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

RIDGE = 0.01  # of the published inverse
LARGEST_RIDGE = 0.05  # alpha p^2 stays below 2: (1 + 0.05)^2 1.8 < 2, and rho is at least 1


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Differences as shares of the root mean square of a head's result; NaN where NaN is wanted."""
    for g, w in zip(got, want, strict=True):
        assert g.shape == w.shape
        assert g.dtype == w.dtype
        rms = w.double().square().mean((2, 3), keepdim=True).sqrt().nan_to_num(0.0).clamp_min(1e-30)
        torch.testing.assert_close(g.double() / rms, w.double() / rms, atol=atol, rtol=rtol, equal_nan=True)


SPEC = OpSpec(
    schema="softmax_free_attention(Tensor q, Tensor v, Tensor landmarks, float scale, str mode, int iterations, "
    "float ridge, bool normalize, bool batch_coupled) -> Tensor",
    outputs=lambda q, v, *rest: [(v.shape, v.dtype)],
    reference=softmax_free_attention_reference,
    portable="portable:softmax_free_attention_portable",
    cases=cases,
    tolerances={
        torch.float32: (2e-4, 1e-4),
        torch.bfloat16: (2e-3, 8e-3),  # two roundings of a number can be one step apart
        torch.float16: (1e-3, 1e-3),
    },
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def attend_softmax_free(
    q: torch.Tensor,
    v: torch.Tensor,
    landmarks: torch.Tensor,
    *,
    scale: float | None = None,
    mode: str = "newton",
    iterations: int = 20,
    ridge: float | None = None,
    normalize: bool = False,
    batch_coupled: bool = False,
) -> torch.Tensor:
    """Attention without a softmax, through landmarks: linear in N, and no N x m matrix in memory.

    With Q = scale * q, whose rows are keys too, and L the landmarks:

        Cm[i, j] = exp(-|Q_i - L_j|^2 / 2)        A[i, j] = exp(-|L_i - L_j|^2 / 2)        P = A + ridge I
        Y = Cm pinv (Cm^T v)                      pinv about P^-1
        Y = Cm D^-1/2 pinv D^-1/2 (Cm^T v)        normalize: D = diag(A 1)

    mode "newton": pinv is what `iterations` steps of V <- 2 V - V P V reach from V = alpha P, the published form. With
    rho = the largest row sum of A, alpha = 1.8 / rho^2; normalised: 2 / rho^2, then halved until no column of
    |I - alpha P P| sums to more than 1.01, ten times at most. In the eigenbasis of P that is
    (1 - (1 - alpha p^2)^(2^iterations)) / p: after 20 steps, eigenvalues below about rho / 1000 are damped, not
    inverted. Steps that could not change a converged inverse any more may be left out. The normalised form has no
    ridge and its alpha p^2 comes close to 2 where landmarks are far apart: there float32 has few digits left.
    mode "solve": pinv = P^-1, by Cholesky, which "newton" comes to where landmarks are well spread.

    Args:
        q: [B, H, N, d], float32, bfloat16 or float16, any strides.
        v: [B, H, N, dv], dtype of q, any strides.
        landmarks: [B, H, m, d], dtype of q, on the scale of Q, not of q; m at least 1.
        scale: of the queries; d^(-1/4) if None.
        mode: "newton" or "solve".
        iterations: Newton's steps, from 0.
        ridge: added to the diagonal of A; None: 0.01, but 0 for the normalised Newton, as published. Newton's
            steps converge up to 0.05. "solve" needs one above 0, and about 1e-6 m to be factored in float32: a head
            that could not be is NaN.
        normalize: the symmetrically normalised form.
        batch_coupled: rho and the halving are taken over all heads of the whole batch, as the published code of
            the normalised form does: a result then depends on the other samples of the batch. Without it they do not.

    Returns:
        Y: [B, H, N, dv], dtype of v. Arithmetic is float32 whatever the dtype; distances are taken around the mean
        landmark, so that a large common mean costs nothing. A NaN makes its own head NaN; an infinite query is
        infinitely far from every landmark: its row of Y is zero.

    Gradients are those of this definition in float64, each Newton step differentiated. The published training
    code takes pinv for an exact inverse in the backward pass; the two agree where Newton has converged.

    Raises:
        ValueError: wrong rank, shape, mode, device; a number out of range; `batch_coupled` without the
            normalised Newton.
        TypeError: another dtype.

    Source: Lu et al., "SOFT: softmax-free transformer with linear complexity" (NeurIPS 2021), section 3; the ridge
    and the step 1.8 / rho^2 from the authors' code (fudan-zvg/SOFT, MIT); the normalised form: Lu et al., "Softmax-free
    linear transformers" (IJCV 2024).
    """
    op = "softmax_free_attention"
    check_rank(op, "q", q, 4, "[B, H, N, d]")
    check_rank(op, "v", v, 4, "[B, H, N, dv]")
    check_rank(op, "landmarks", landmarks, 4, "[B, H, m, d]")
    check_float(op, "q", q)
    check_alike(op, "v", v, "q", q)
    check_alike(op, "landmarks", landmarks, "q", q)
    if q.shape[3] == 0:
        raise ValueError(f"{op}: q must be [B, H, N, d] with d at least 1, got {list(q.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"{op}: v must be {[*q.shape[:3], 'dv']} like q, got {list(v.shape)}")
    if landmarks.shape[:2] != q.shape[:2] or landmarks.shape[3] != q.shape[3] or landmarks.shape[2] == 0:
        needed = [*q.shape[:2], "m", q.shape[3]]
        raise ValueError(f"{op}: landmarks must be {needed} with m at least 1, got {list(landmarks.shape)}")
    check_choice(op, "mode", mode, MODES)
    if iterations < 0:
        raise ValueError(f"{op}: iterations must be at least 0, got {iterations}")
    if batch_coupled and not (normalize and mode == "newton"):
        raise ValueError(f"{op}: batch_coupled needs normalize=True and mode='newton', got {normalize} and {mode!r}")
    if ridge is None:
        ridge = 0.0 if normalize and mode == "newton" else RIDGE
    if not (ridge > 0 if mode == "solve" else 0 <= ridge <= LARGEST_RIDGE):
        range_of = "above 0 to solve" if mode == "solve" else f"from 0 to {LARGEST_RIDGE} for Newton to converge"
        raise ValueError(f"{op}: ridge must be {range_of}, got {ridge}")
    factor = float(q.shape[3]) ** -0.25 if scale is None else scale
    return (_op if is_compiling() else _call)(
        q, v, landmarks, factor, mode, iterations, ridge, normalize, batch_coupled
    )
