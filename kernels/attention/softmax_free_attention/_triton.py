"""softmax_free_attention on the GPU: W = Cm^T V in parts, the small inverse, Y = Cm U.

Tiles of Cm are made where they are used; no N x m matrix is stored. Distances are float32 products around the mean
landmark, no TF32. The inverse is CUDA C++ (`_cuda.py`), but Newton above 100 landmarks is two batched products a step
here, and the normalised form's first step is found with PyTorch operators, which do not wait for the device either. No
atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.attention.softmax_free_attention import _cuda
from planmill.kernels.attention.softmax_free_attention.reference import HALVINGS, LARGEST_NORM
from planmill.kernels.common import cuda
from planmill.kernels.common.sizes import tuned_for
from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_N, BLOCK_M = 32, 32  # queries and landmarks of a tile; a wider one spills, since float32 products are unrolled
CHANNELS = 32  # of a tile
PRODUCT = 64  # rows and columns of a tile of a product
SOLVE_THREADS = 256
PROGRAMS = 264  # two for each of 132 processors: sums over queries are split until there are as many
FARTHEST = tl.constexpr(1e15)  # its square is finite; what is farther counts as this


@triton.jit
def load_centred(p_rows, p_centre, o_rows, o_d, rows, d, stride, stride_d, factor):
    """factor x - centre of rows, float32, 0 behind d."""
    mask = (o_rows < rows)[:, None] & (o_d < d)[None, :]
    x = tl.load(
        p_rows + o_rows.to(tl.int64)[:, None] * stride + o_d.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0
    )
    x = x.to(tl.float32) * factor - tl.load(p_centre + o_d, mask=o_d < d, other=0.0)[None, :]
    x = tl.where(x > FARTHEST, FARTHEST, tl.where(x < -FARTHEST, -FARTHEST, x))
    return tl.where(mask, x, 0.0)


@triton.jit
def gaussian_tile(
    p_q, p_landmarks, p_centre, o_n, o_m, tokens, m, d, stride_n, stride_d, factor,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Cm of a tile; what lies behind N or m is some number."""
    products = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    others = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(0, d, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        x = load_centred(p_q, p_centre, o_n, o_d, tokens, d, stride_n, stride_d, factor)
        y = load_centred(p_landmarks, p_centre, o_m, o_d, m, d, d, 1, 1.0)
        products += tl.dot(x, tl.trans(y), input_precision="ieee")
        squares += tl.sum(x * x, 1)
        others += tl.sum(y * y, 1)
    exponent = products - 0.5 * (squares[:, None] + others[None, :])
    return tl.exp(tl.where(exponent > 0.0, 0.0, exponent))


@triton.jit(do_not_specialize=["heads", "tokens", "m", "d", "dv", "splits", "run", "factor"])
def gather_kernel(
    q_ptr, v_ptr, landmarks_ptr, centre_ptr, partials_ptr, heads, tokens, m, d, dv, splits, run, factor,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_vb, stride_vh, stride_vn, stride_vd,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """W of BLOCK_M landmarks and BLOCK_V channels, over a run of queries."""
    split, head = tl.program_id(0) % splits, tl.program_id(0) // splits
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_v = tl.program_id(2) * BLOCK_V + tl.arange(0, BLOCK_V)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_q, p_v = q_ptr + b * stride_qb + h * stride_qh, v_ptr + b * stride_vb + h * stride_vh
    wide = head.to(tl.int64)
    p_landmarks, p_centre = landmarks_ptr + wide * m * d, centre_ptr + wide * d
    sums = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    for start in range(split * run, tl.minimum(split * run + run, tokens), BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        c = gaussian_tile(
            p_q, p_landmarks, p_centre, o_n, o_m, tokens, m, d, stride_qn, stride_qd, factor, BLOCK_N, BLOCK_M, BLOCK_D
        )
        c = tl.where((o_n < tokens)[:, None], c, 0.0)
        mask = (o_n < tokens)[:, None] & (o_v < dv)[None, :]
        p_tile = p_v + o_n.to(tl.int64)[:, None] * stride_vn + o_v.to(tl.int64)[None, :] * stride_vd
        values = tl.load(p_tile, mask=mask, other=0.0).to(tl.float32)
        sums += tl.dot(tl.trans(c), values, input_precision="ieee")
    p_out = partials_ptr + ((wide * splits + split) * m + o_m)[:, None] * dv + o_v[None, :]
    tl.store(p_out, sums, mask=(o_m < m)[:, None] & (o_v < dv)[None, :])


@triton.jit(do_not_specialize=["heads", "tokens", "m", "d", "dv", "blocks", "factor"])
def scatter_kernel(
    q_ptr, u_ptr, landmarks_ptr, centre_ptr, out_ptr, heads, tokens, m, d, dv, blocks, factor,
    stride_qb, stride_qh, stride_qn, stride_qd,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Y of BLOCK_N queries and BLOCK_V channels."""
    o_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    head = tl.program_id(0) // blocks
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    p_q = q_ptr + (head // heads).to(tl.int64) * stride_qb + (head % heads).to(tl.int64) * stride_qh
    wide = head.to(tl.int64)
    p_landmarks, p_centre = landmarks_ptr + wide * m * d, centre_ptr + wide * d
    sums = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    for start in range(0, m, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        c = gaussian_tile(
            p_q, p_landmarks, p_centre, o_n, o_m, tokens, m, d, stride_qn, stride_qd, factor, BLOCK_N, BLOCK_M, BLOCK_D
        )
        c = tl.where((o_m < m)[None, :], c, 0.0)
        mask = (o_m < m)[:, None] & (o_v < dv)[None, :]
        u = tl.load(u_ptr + (wide * m + o_m)[:, None] * dv + o_v[None, :], mask=mask, other=0.0)
        sums += tl.dot(c, u, input_precision="ieee")
    p_out = out_ptr + (wide * tokens + o_n)[:, None] * dv + o_v[None, :]
    tl.store(p_out, sums.to(out_ptr.dtype.element_ty), mask=(o_n < tokens)[:, None] & (o_v < dv)[None, :])


@triton.jit(do_not_specialize=["rows", "depth", "columns", "blocks", "old", "new"])
def product_kernel(
    a_ptr, b_ptr, c_ptr, out_ptr, rows, depth, columns, blocks, old, new, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr
):
    """A tile of old * c + new * a b, of a batch of matrices."""
    batch, i = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_i, o_j = i * BLOCK + tl.arange(0, BLOCK), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    p_a, p_b = a_ptr + batch * rows * depth, b_ptr + batch * depth * columns
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        mask = (o_i < rows)[:, None] & (o_k < depth)[None, :]
        a = tl.load(p_a + o_i.to(tl.int64)[:, None] * depth + o_k[None, :], mask=mask, other=0.0)
        mask = (o_k < depth)[:, None] & (o_j < columns)[None, :]
        b = tl.load(p_b + o_k.to(tl.int64)[:, None] * columns + o_j[None, :], mask=mask, other=0.0)
        sums += tl.dot(a, b, input_precision="ieee")
    o_out = batch * rows * columns + o_i.to(tl.int64)[:, None] * columns + o_j[None, :]
    mask = (o_i < rows)[:, None] & (o_j < columns)[None, :]
    if old != 0.0:
        sums = new * sums + old * tl.load(c_ptr + o_out, mask=mask, other=0.0)
    tl.store(out_ptr + o_out, sums, mask=mask)


def multiply(
    a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None, old: float = 0.0, new: float = 1.0
) -> torch.Tensor:
    """a b, or old * c + new * a b, for batches [n, rows, depth] and [n, depth, columns], float32 without TF32."""
    batch, rows, depth = a.shape
    columns = b.shape[2]
    out = torch.empty(batch, rows, columns, dtype=torch.float32, device=a.device)
    blocks = triton.cdiv(rows, PRODUCT)
    product_kernel[(batch * blocks, triton.cdiv(columns, PRODUCT))](
        a,
        b,
        out if c is None else c,
        out,
        rows,
        depth,
        columns,
        blocks,
        old,
        new,
        BLOCK=PRODUCT,
        BLOCK_K=32,
        num_warps=4,
    )
    return out


def first_step(p: torch.Tensor, sums: torch.Tensor, normalize: bool, coupled: bool) -> torch.Tensor:
    """alpha [heads] of Newton, halved where the normalised form asks for it."""
    rho = sums.amax(1)
    if not normalize:
        return 1.8 / rho.square()
    alpha = 2.0 / (rho.amax() if coupled else rho).square().expand_as(rho)
    eye, square = torch.eye(p.shape[1], device=p.device), multiply(p, p)
    for _ in range(HALVINGS):
        norm = (eye - alpha[:, None, None] * square).abs().sum(1).amax(1)
        alpha = torch.where((norm.amax() if coupled else norm) > LARGEST_NORM, alpha / 2, alpha)
    return alpha.contiguous()


def invert(
    landmarks: torch.Tensor,
    partials: torch.Tensor,
    mode: str,
    iterations: int,
    ridge: float,
    normalize: bool,
    coupled: bool,
) -> torch.Tensor:
    """U [heads, m, dv]."""
    if mode == "solve":
        return _cuda.invert_by_solving(landmarks, partials, ridge, normalize, SOLVE_THREADS)
    m = landmarks.shape[1]
    fits = _cuda.newton_fits(m) and not cuda.is_followed()
    if fits and not normalize:
        return _cuda.invert_newton(landmarks, landmarks[:0], partials, iterations, ridge, normalize, SOLVE_THREADS)
    distances = torch.cdist(landmarks, landmarks, compute_mode="donot_use_mm_for_euclid_dist")
    a = torch.exp(distances.square() * -0.5)
    sums = a.sum(2)
    p = a + ridge * torch.eye(m, device=a.device)
    alpha = first_step(p, sums, normalize, coupled)
    if fits:
        return _cuda.invert_newton(landmarks, alpha, partials, iterations, ridge, normalize, SOLVE_THREADS)
    scale = sums.rsqrt()[..., None] if normalize else 1.0
    v = alpha[:, None, None] * p
    for _ in range(iterations):
        v = multiply(v, multiply(p, v), v, 2.0, -1.0)
    return multiply(v, (partials.sum(1) * scale).contiguous()) * scale


def launch(
    q: torch.Tensor, v: torch.Tensor, landmarks: torch.Tensor, scale: float, mode: str, iterations: int, ridge: float,
    normalize: bool, batch_coupled: bool,
) -> torch.Tensor:  # fmt: skip
    """Y [B, H, N, dv]; the contract is that of `attend_softmax_free`."""
    batch, heads, tokens, dv = v.shape
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return out
    m, d = landmarks.shape[2:]
    flat = landmarks.float().reshape(batch * heads, m, d).contiguous()
    centre = flat.mean(1)
    tiles = {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "BLOCK_D": CHANNELS, "BLOCK_V": CHANNELS}
    m_blocks, v_blocks = triton.cdiv(m, BLOCK_M), triton.cdiv(dv, CHANNELS)
    wanted = triton.cdiv(PROGRAMS, tuned_for(batch * heads * m_blocks * v_blocks))
    run = triton.cdiv(triton.cdiv(tokens, wanted), BLOCK_N) * BLOCK_N
    splits = triton.cdiv(tokens, run)
    with torch.cuda.device_of(q):
        partials = torch.empty(batch * heads, splits, m, dv, dtype=torch.float32, device=q.device)
        gather_kernel[(batch * heads * splits, m_blocks, v_blocks)](
            q, v, flat, centre, partials, heads, tokens, m, d, dv, splits, run, scale, *q.stride(), *v.stride(),
            **tiles, num_warps=4,
        )  # fmt: skip
        u = invert(flat, partials, mode, iterations, ridge, normalize, batch_coupled)
        blocks = triton.cdiv(tokens, BLOCK_N)
        scatter_kernel[(batch * heads * blocks, v_blocks)](
            q, u, flat, centre, out, heads, tokens, m, d, dv, blocks, scale, *q.stride(), **tiles, num_warps=4
        )
    return out


def _static() -> list[StaticKernel]:
    made = [
        StaticKernel(
            product_kernel,
            scalars={"old": "fp32", "new": "fp32"},
            constants={"BLOCK": PRODUCT, "BLOCK_K": 32},
            num_warps=8,
        )
    ]
    for kind in ("*fp32", "*bf16"):
        constants = {"BLOCK_N": BLOCK_N, "BLOCK_M": BLOCK_M, "BLOCK_D": CHANNELS, "BLOCK_V": CHANNELS, "stride_qd": 1}
        made += [
            StaticKernel(
                gather_kernel, {"q_ptr": kind, "v_ptr": kind}, {"factor": "fp32"}, {**constants, "stride_vd": 1}
            ),
            StaticKernel(scatter_kernel, {"q_ptr": kind, "out_ptr": kind}, {"factor": "fp32"}, constants),
        ]
    return made


STATIC = _static()
