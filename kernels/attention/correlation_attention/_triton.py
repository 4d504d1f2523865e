"""correlation_attention on the GPU: a program holds a tile of queries and walks over the keys once for each map.

Statistics and sums of a map stay in registers; at its end the normalised result joins the sum, so that one accumulator
more serves any number of maps: four at a time do not fit the registers. What later maps read again, values above all,
comes from the second-level cache. 16-bit input goes through tensor cores in 16 bits, and so do the weights, as in
other flash kernels; float32 is multiplied in float32. Values wider than 128 are done in blocks of columns, each with
the scores anew. The map "qkv" reads a copy of the three behind one another. No atomics: equal inputs give equal bits.
"""

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

LARGEST = tl.constexpr(1e38)
PRECISION = tl.constexpr("ieee")
MOST = 128  # columns of one block; wider rows are taken in parts
PART = 64
WARPS = 8
ORDER = ("qq", "kk", "vv", "qkv", "qk")  # bits of a set of maps


@triton.jit
def load_rows(p_rows, first, tokens, part, width, stride_n, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    """BLOCK_N rows from `first`, BLOCK_D columns from `part`; 0 outside. Offsets inside the tile fit 32 bits."""
    o_n, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    p_tile = p_rows + tl.cast(first, tl.int64) * stride_n + part
    mask = (first + o_n < tokens)[:, None] & (part + o_d < width)[None, :]
    return tl.load(p_tile + (o_n[:, None] * stride_n + o_d[None, :]), mask=mask, other=0.0)


@triton.jit
def score_parts(
    p_x, p_y, first, start, tokens, width, stride_xn, stride_yn,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """x y^T of rows too wide for one block, PART columns at a time."""
    scores = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
    for part in range(0, width, PART):
        x = load_rows(p_x, first, tokens, part, width, stride_xn, BLOCK_Q, PART)
        y = load_rows(p_y, start, tokens, part, width, stride_yn, BLOCK_K, PART)
        scores = tl.dot(x, tl.trans(y), scores, input_precision=PRECISION)
    return scores


@triton.jit
def online_step(scores, kept, values, top, total, seen, mixed):
    """The sums of a tile of queries, one block of keys further; `seen`: whether a score was not NaN."""
    kept = kept & (scores == scores)
    seen = tl.maximum(seen, tl.max(kept.to(tl.int32), 1))
    scores = tl.where(kept, tl.minimum(scores, LARGEST), float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    mixed = tl.dot(weights.to(values.dtype), values, mixed * shrink[:, None], input_precision=PRECISION)
    return higher, total, seen, mixed


@triton.jit
def finish(total, seen, mixed):
    """Normalised results; zeros where no score was above -inf, NaN where all were NaN."""
    nothing = tl.where(seen > 0, 0.0, float("nan"))
    return mixed * (1.0 / tl.where(total > 0.0, total, 1.0) + nothing)[:, None]


@triton.jit
def attend_map(
    p_x, p_y, p_v, first, at, tokens, width, dv, stride_xn, stride_yn, stride_vn,
    scale, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """softmax(x y^T scale) v of the rows from `first` and the columns of v from `at`; WIDE: x in parts of BLOCK_D."""
    top = tl.full((BLOCK_Q,), -LARGEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    seen = tl.zeros((BLOCK_Q,), tl.int32)
    mixed = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    if not WIDE:
        x = load_rows(p_x, first, tokens, 0, width, stride_xn, BLOCK_Q, BLOCK_D)
    for start in range(0, tokens, BLOCK_K):
        if WIDE:
            scores = score_parts(
                p_x,
                p_y,
                first,
                start,
                tokens,
                width,
                stride_xn,
                stride_yn,
                BLOCK_Q,
                BLOCK_K,
                BLOCK_D,
            )
        else:
            y = load_rows(p_y, start, tokens, 0, width, stride_yn, BLOCK_K, BLOCK_D)
            scores = tl.dot(x, tl.trans(y), input_precision=PRECISION)
        values = load_rows(p_v, start, tokens, at, dv, stride_vn, BLOCK_K, BLOCK_V)
        kept = (start + tl.arange(0, BLOCK_K) < tokens)[None, :]
        top, total, seen, mixed = online_step(scores * scale, kept, values, top, total, seen, mixed)
    return finish(total, seen, mixed)


@triton.jit(do_not_specialize=["heads", "tokens", "tiles"])
def correlation_kernel(
    q_ptr, k_ptr, v_ptr, joint_ptr, new_ptr, original_ptr, heads, tokens, d, dv, dj, tiles, scale,
    stride_qb, stride_qh, stride_qn, stride_kb, stride_kh, stride_kn,
    stride_vb, stride_vh, stride_vn,
    SUMMED: tl.constexpr, ORIGINAL: tl.constexpr, WIDE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Rows of one head, BLOCK_V columns of its values: the sum of the maps in the bits of SUMMED, and the original.

    One loop over the maps instead of one for each: what loops side by side keep for each other spills.
    """
    head = tl.program_id(0) // tiles
    first, at = tl.program_id(0) % tiles * BLOCK_Q, tl.program_id(1) * BLOCK_V
    b, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    p_q = q_ptr + b * stride_qb + h * stride_qh
    p_k = k_ptr + b * stride_kb + h * stride_kh
    p_v = v_ptr + b * stride_vb + h * stride_vh
    p_joint = joint_ptr + head.to(tl.int64) * tokens * dj
    o_out = head.to(tl.int64) * tokens * dv + first.to(tl.int64) * dv + at
    o_n, o_v = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_V)
    o_tile = o_n[:, None] * dv + o_v[None, :]
    m_out = (first + o_n < tokens)[:, None] & (at + o_v < dv)[None, :]
    new = tl.zeros((BLOCK_Q, BLOCK_V), tl.float32)
    for m in range(0, 5):  # the order of ORDER
        if ((SUMMED | ORIGINAL) >> m) & 1:
            p_x = tl.where(m == 1, p_k, tl.where(m == 2, p_v, tl.where(m == 3, p_joint, p_q)))
            p_y = tl.where(m == 4, p_k, p_x)
            stride_xn = tl.where(m == 1, stride_kn, tl.where(m == 2, stride_vn, tl.where(m == 3, dj, stride_qn)))
            stride_yn = tl.where(m == 4, stride_kn, stride_xn)
            width = tl.where(m == 2, dv, tl.where(m == 3, dj, d))
            factor = tl.where(m == 3, scale * 0.5773502691896258, scale)
            found = attend_map(
                p_x, p_y, p_v, first, at, tokens, width, dv, stride_xn, stride_yn,
                stride_vn, factor, WIDE, BLOCK_Q, BLOCK_K, BLOCK_D, BLOCK_V,
            )  # fmt: skip
            if (SUMMED >> m) & 1:
                new += found
            if ORIGINAL and m == 4:
                tl.store(original_ptr + o_out + o_tile, found, mask=m_out)
    tl.store(new_ptr + o_out + o_tile, new, mask=m_out)


def choose(half: bool, widest: int, columns: int) -> dict[str, Any]:
    """Blocks that do not spill, by 16 bits or float32, the widest rows of a product, and the columns of the values."""
    block_v = min(MOST, max(16, triton.next_power_of_2(columns)))
    wide = widest > MOST
    block_d = PART if wide else max(16, triton.next_power_of_2(widest))
    large = max(block_v, block_d) > 64
    rows, keys = (64, 32 if large else 64) if half else (32, 16)
    return {"WIDE": wide, "BLOCK_D": block_d, "BLOCK_V": block_v, "BLOCK_Q": rows, "BLOCK_K": keys}


def stages(half: bool) -> int:
    """Loads in flight: float32 has no registers left for them."""
    return 2 if half else 1


def bits(maps: list[str]) -> int:
    """The set of maps as the kernel reads it."""
    return sum(1 << ORDER.index(name) for name in maps)


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, maps: str, original: bool, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of the maps and the original map [B, H, N, dv]; the contract is that of `attend_in_two_streams`."""
    batch, heads, tokens, dv = v.shape
    new = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    plain = torch.empty((batch * original, heads, tokens, dv), dtype=v.dtype, device=v.device)
    if v.numel() == 0:
        return new, plain
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    names, d = maps.split("+"), q.shape[3]
    joint = torch.cat([q, k, v], -1) if "qkv" in names else q
    read = {"qkv": joint.shape[3], "vv": dv}
    half = v.dtype != torch.float32
    blocks = choose(half, max(d, *(read.get(name, d) for name in names)), dv)
    tiles = triton.cdiv(tokens, blocks["BLOCK_Q"])
    with torch.cuda.device_of(v):
        correlation_kernel[(batch * heads * tiles, triton.cdiv(dv, blocks["BLOCK_V"]))](
            q, k, v, joint, new, plain, heads, tokens, d, dv, joint.shape[3], tiles, scale,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], SUMMED=bits(names), ORIGINAL=bits(["qk"] * original),
            **blocks, num_warps=WARPS, num_stages=stages(half),
        )  # fmt: skip
    return new, plain


def _static() -> list[StaticKernel]:
    made = []
    for dtype in ("*fp32", "*bf16", "*fp16"):
        half = dtype != "*fp32"
        for width, maps, original in ((64, "qq+kk+vv", ["qk"]), (128, "vv", ["qk"]), (256, "qk+qkv", [])):
            if dtype == "*fp16" and width != 64:
                continue
            pointers = {f"{name}_ptr": dtype for name in ("q", "k", "v", "joint", "new", "original")}
            chosen = {"SUMMED": bits(maps.split("+")), "ORIGINAL": bits(original)}
            constants = {**chosen, **choose(half, width, width)}
            kernel = StaticKernel(correlation_kernel, pointers, {"scale": "fp32"}, constants, WARPS, stages(half))
            made.append(replace(kernel, tensor_core=half, aligned=("d", "dv", "dj")))
    return made


STATIC = _static()
