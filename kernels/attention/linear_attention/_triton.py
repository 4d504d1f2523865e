"""linear_attention on the GPU: one launch for short sequences, three for others.

Short: a program holds M and z of one head and some value channels, walks over the keys, then over the queries.
Otherwise the keys are summed split by split; the splits are added, or where causal each is replaced by the sum of those
before it; then every tile of queries meets its state, and where causal the keys of its own tile. No atomics: equal
inputs give equal bits. Features, states and sums are float32; products of 16-bit inputs are TF32, which holds the
values exactly.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

TILES = {torch.float32: (16, 32, 8), torch.bfloat16: (64, 32, 8), torch.float16: (64, 32, 8)}  # tokens, E, warps
SPLIT = 1024  # keys that a program sums where not causal
LONGEST = 1024  # tokens of what one launch does
WIDEST, ADDED = 64, 1024  # D of a tile; numbers of states that a program adds


@triton.jit
def feature(x, MAP: tl.constexpr):
    """phi; NaN stays."""
    if MAP == "elu":
        return tl.where(x > 0, x + 1.0, tl.exp(tl.where(x > 0, 0.0, x)))
    positive = tl.where(x < 0, 0.0, x)
    if MAP == "relu":
        return positive
    if MAP == "squared_relu":
        return positive * positive
    return x


@triton.jit
def load_rows(p_x, o_n, o_d, kept, width, stride_n, stride_d, MAP: tl.constexpr):
    """phi of rows; zero where not kept."""
    m_x = kept[:, None] & (o_d < width)[None, :]
    p_tile = p_x + o_n.to(tl.int64)[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
    return tl.where(m_x, feature(tl.load(p_tile, mask=m_x, other=0.0).to(tl.float32), MAP), 0.0)


@triton.jit
def keep(p_mask, o_n, last, MASKED: tl.constexpr):
    """Which keys are there."""
    kept = o_n < last
    if MASKED:
        kept = kept & (tl.load(p_mask + o_n, mask=kept, other=0) != 0)
    return kept


@triton.jit
def weigh(scores, v, PRECISION: tl.constexpr):
    """scores v; a value that is not finite makes its own row and the later ones NaN, and no earlier one."""
    finite = tl.abs(v) < float("inf")
    o = tl.dot(scores, tl.where(finite, v, 0.0), input_precision=PRECISION)
    if tl.min(finite.to(tl.int32)) == 0:
        o += tl.cumsum(v - v, 0)
    return o


@triton.jit
def store_rows(p_out, o, total, o_n, o_e, queries, values, scale, eps, NORMALIZE: tl.constexpr):
    """Rows of the result."""
    factor = scale / (scale * total + eps) if NORMALIZE else tl.zeros_like(total) + scale
    p_tile = p_out + o_n.to(tl.int64)[:, None] * values + o_e[None, :]
    tl.store(p_tile, o * factor[:, None], mask=(o_n < queries)[:, None] & (o_e < values)[None, :])


@triton.jit(do_not_specialize=["heads", "queries", "keys", "scale", "eps"])
def whole_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, out_ptr, heads, queries, keys, width, values, scale, eps,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """One head, BLOCK_E value channels, all tokens; D <= BLOCK_D."""
    head = tl.program_id(0)
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    o_e, o_d = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.arange(0, BLOCK_D)
    o_r = tl.arange(0, BLOCK)
    p_q, p_k = q_ptr + b * stride_qb + h * stride_qh, k_ptr + b * stride_kb + h * stride_kh
    p_v, p_mask = v_ptr + b * stride_vb + h * stride_vh, mask_ptr + b * keys
    p_out = out_ptr + head.to(tl.int64) * queries * values
    state = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, keys, BLOCK):
        o_n = start + o_r
        kept = keep(p_mask, o_n, keys, MASKED)
        k = load_rows(p_k, o_n, o_d, kept, width, stride_kn, stride_kd, MAP)
        v = load_rows(p_v, o_n, o_e, kept, values, stride_vn, stride_ve, "identity")
        if CAUSAL:
            q = load_rows(p_q, o_n, o_d, o_n < queries, width, stride_qn, stride_qd, MAP)
            scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            scores = tl.where(o_r[:, None] >= o_r[None, :], scores, 0.0)
            o = tl.dot(q, state, input_precision=PRECISION) + weigh(scores, v, PRECISION)
            total = tl.sum(q * z[None, :], 1) + tl.sum(scores, 1)
            store_rows(p_out, o, total, o_n, o_e, queries, values, scale, eps, NORMALIZE)
        state += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        z += tl.sum(k, 0)
    if not CAUSAL:
        for start in range(0, queries, BLOCK):
            o_n = start + o_r
            q = load_rows(p_q, o_n, o_d, o_n < queries, width, stride_qn, stride_qd, MAP)
            o = tl.dot(q, state, input_precision=PRECISION)
            total = tl.sum(q * z[None, :], 1)
            store_rows(p_out, o, total, o_n, o_e, queries, values, scale, eps, NORMALIZE)


@triton.jit(do_not_specialize=["heads", "keys", "splits", "split"])
def state_kernel(
    k_ptr, v_ptr, mask_ptr, state_ptr, heads, keys, width, values, splits, split,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_ve,
    MAP: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """M and z of the keys of one split: a tile [BLOCK_D, BLOCK_E] of M, and z beside its first columns."""
    unit = tl.program_id(0)
    head, part = unit // splits, unit % splits
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    o_e, o_d = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E), tl.program_id(2) * BLOCK_D + tl.arange(0, BLOCK_D)
    p_k, p_v = k_ptr + b * stride_kb + h * stride_kh, v_ptr + b * stride_vb + h * stride_vh
    state = tl.zeros((BLOCK_D, BLOCK_E), tl.float32)
    z = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(part * split, tl.minimum((part + 1) * split, keys), BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        kept = keep(mask_ptr + b * keys, o_n, keys, MASKED)
        k = load_rows(p_k, o_n, o_d, kept, width, stride_kn, stride_kd, MAP)
        v = load_rows(p_v, o_n, o_e, kept, values, stride_vn, stride_ve, "identity")
        state += tl.dot(tl.trans(k), v, input_precision=PRECISION)
        z += tl.sum(k, 0)
    p_state = state_ptr + unit.to(tl.int64) * width * (values + 1)
    m_d = o_d < width
    p_tile = p_state + o_d.to(tl.int64)[:, None] * values + o_e[None, :]
    tl.store(p_tile, state, mask=m_d[:, None] & (o_e < values)[None, :])
    if tl.program_id(1) == 0:
        tl.store(p_state + width * values + o_d, z, mask=m_d)


@triton.jit(do_not_specialize=["splits", "numbers"])
def sum_kernel(state_ptr, splits, numbers, CAUSAL: tl.constexpr, BLOCK: tl.constexpr):
    """States of the splits of a head: replaced by the sums of those before, or their sum in place of the first."""
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < numbers
    p_state = state_ptr + tl.program_id(0).to(tl.int64) * splits * numbers + o_i
    total = tl.zeros((BLOCK,), tl.float32)
    p_part = p_state
    for _ in range(splits):
        own = tl.load(p_part, mask=m_i, other=0.0)
        if CAUSAL:
            tl.store(p_part, total, mask=m_i)
        total += own
        p_part += numbers
    if not CAUSAL:
        tl.store(p_state, total, mask=m_i)


@triton.jit(do_not_specialize=["heads", "queries", "tiles", "splits", "scale", "eps"])
def query_kernel(
    q_ptr, k_ptr, v_ptr, mask_ptr, state_ptr, out_ptr, heads, queries, width, values, tiles, splits, scale, eps,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_ve,
    MAP: tl.constexpr, NORMALIZE: tl.constexpr, CAUSAL: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """BLOCK queries, BLOCK_E value channels, against their state and, where causal, the keys of their tile."""
    head, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    o_r, o_e = tl.arange(0, BLOCK), tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    o_n = tile * BLOCK + o_r
    p_q, p_k = q_ptr + b * stride_qb + h * stride_qh, k_ptr + b * stride_kb + h * stride_kh
    p_v = v_ptr + b * stride_vb + h * stride_vh
    p_state = state_ptr + (head.to(tl.int64) * splits + (tile if CAUSAL else 0)) * width * (values + 1)
    kept = keep(mask_ptr + b * queries, o_n, queries, MASKED and CAUSAL)
    o = tl.zeros((BLOCK, BLOCK_E), tl.float32)
    scores = tl.zeros((BLOCK, BLOCK), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        q = load_rows(p_q, o_n, o_d, o_n < queries, width, stride_qn, stride_qd, MAP)
        m_state = (o_d < width)[:, None] & (o_e < values)[None, :]
        state = tl.load(p_state + o_d.to(tl.int64)[:, None] * values + o_e[None, :], mask=m_state, other=0.0)
        o += tl.dot(q, state, input_precision=PRECISION)
        z = tl.load(p_state + width * values + o_d, mask=o_d < width, other=0.0)
        total += tl.sum(q * z[None, :], 1)
        if CAUSAL:
            k = load_rows(p_k, o_n, o_d, kept, width, stride_kn, stride_kd, MAP)
            scores += tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if CAUSAL:
        scores = tl.where(o_r[:, None] >= o_r[None, :], scores, 0.0)
        v = load_rows(p_v, o_n, o_e, kept, values, stride_vn, stride_ve, "identity")
        o += weigh(scores, v, PRECISION)
        total += tl.sum(scores, 1)
    p_out = out_ptr + head.to(tl.int64) * queries * values
    store_rows(p_out, o, total, o_n, o_e, queries, values, scale, eps, NORMALIZE)


def block_of(n: int, most: int) -> int:
    """The tile for n channels: a power of two of 16 to `most`."""
    return min(max(16, triton.next_power_of_2(n)), most)


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, feature_map: str, normalize: bool,
    causal: bool, scale: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    """o [B, H, N, E] of the dtype of q; the contract is that of `attend_linearly`."""
    (batch, heads, queries, width), (keys, values) = q.shape, v.shape[2:]
    out = torch.empty(batch, heads, queries, values, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    mask = mask.contiguous().view(torch.uint8)
    chunk, most, warps = TILES[q.dtype]
    precision = "ieee" if q.dtype is torch.float32 else "tf32"
    options = {"MAP": feature_map, "MASKED": mask.numel() > 0, "PRECISION": precision, "BLOCK": chunk}
    options |= {"BLOCK_D": block_of(width, WIDEST), "BLOCK_E": block_of(values, most), "num_warps": warps}
    forms = {"NORMALIZE": normalize, "CAUSAL": causal}
    columns = triton.cdiv(values, options["BLOCK_E"])
    with torch.cuda.device_of(q):
        if max(queries, keys) <= LONGEST and width <= WIDEST:
            whole_kernel[(batch * heads, columns)](
                q, k, v, mask, out, heads, queries, keys, width, values, scale, eps, *q.stride(), *k.stride(),
                *v.stride(), **options, **forms,
            )  # fmt: skip
            return out
        split = chunk if causal else SPLIT
        splits, tiles, numbers = triton.cdiv(keys, split), triton.cdiv(queries, chunk), width * (values + 1)
        states = torch.empty(batch * heads, max(splits, 1), numbers, dtype=torch.float32, device=q.device)
        if keys:
            state_kernel[(batch * heads * splits, columns, triton.cdiv(width, WIDEST))](
                k, v, mask, states, heads, keys, width, values, splits, split, *k.stride(), *v.stride(), **options
            )
        sum_kernel[(batch * heads, triton.cdiv(numbers, ADDED))](
            states, splits, numbers, CAUSAL=causal, BLOCK=ADDED, num_warps=4
        )
        query_kernel[(batch * heads * tiles, columns)](
            q, k, v, mask, states, out, heads, queries, width, values, tiles, max(splits, 1), scale, eps, *q.stride(),
            *k.stride(), *v.stride(), **options, **forms,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    made = [StaticKernel(sum_kernel, constants={"CAUSAL": True, "BLOCK": ADDED})]
    strides = {f"stride_{x}": 1 for x in ("qd", "kd", "ve")}
    for dtype, kind in ((torch.float32, "*fp32"), (torch.bfloat16, "*bf16")):
        chunk, most, warps = TILES[dtype]
        precision = "ieee" if kind == "*fp32" else "tf32"
        options = {
            "MAP": "elu",
            "MASKED": True,
            "PRECISION": precision,
            "BLOCK": chunk,
            "BLOCK_D": WIDEST,
            "BLOCK_E": most,
        }
        forms = {**options, "NORMALIZE": True, "CAUSAL": True, **strides}
        keys = {**options, "stride_kd": 1, "stride_ve": 1}
        pointers = {**{f"{x}_ptr": kind for x in ("q", "k", "v", "out")}, "mask_ptr": "*u8"}
        made += [
            StaticKernel(
                kernel, pointers, {"scale": "fp32", "eps": "fp32"}, constants, num_warps=warps,
                tensor_core=kind != "*fp32",
            )
            for kernel, constants in ((whole_kernel, forms), (state_kernel, keys), (query_kernel, forms))
        ]  # fmt: skip
    return made


STATIC = _static()
