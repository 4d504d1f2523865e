"""cluster_attention on the GPU: a flash kernel over the listed rows of each cluster, then a mean for each token.

A program holds a tile of the queries of one cluster and walks over its memory slots and keys, which it gathers by their
indices; masks are comparisons of indices. The results of all clusters, float32, are about as large as the output. Where
they stand for each token is found by a stable sort of the members (torch.sort), so that the mean needs no atomics and
sums in the order of the clusters: equal inputs give equal bits.

Products of float32 are float32; those of half dtypes go through the tensor cores, the weights rounded to the dtype.
Heads of more than 256 channels run the reference, whose sums are in no fixed order on a GPU.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.attention.cluster_attention.reference import cluster_attention_reference
from planmill.kernels.common.triton_checks import StaticKernel

WIDEST = 256  # channels of a head that a tile holds
# By the padded width: queries and keys of a tile, warps, stages. Products of float32 have no tensor cores to feed.
TILES = {64: (64, 32, 4, 2), 128: (32, 32, 4, 2), 256: (16, 32, 4, 2)}
FLOAT32_TILES = {64: (64, 32, 8, 1), 128: (32, 16, 8, 1), 256: (16, 16, 8, 1)}
BLOCK_N = 16  # tokens of a tile of means
LARGEST = tl.constexpr(3.4028234663852886e38)  # logits beyond count as this, and hidden ones as its negative
SELF = tl.constexpr(-5e4)
NORM_EPSILON = tl.constexpr(1e-12)
MEAN_EPSILON = tl.constexpr(1e-5)
FAR = tl.constexpr(1e18)  # squares of larger numbers may leave the range
RANGE = tl.constexpr(2.0**-80)


@triton.jit
def load_rows(p_head, o_rows, m_rows, o_d, width, stride_n, stride_d):
    """Tile [rows, d] of one head; 0 outside."""
    p_tile = p_head + o_rows.to(tl.int64)[:, None] * stride_n + o_d.to(tl.int64)[None, :] * stride_d
    return tl.load(p_tile, mask=m_rows[:, None] & (o_d < width)[None, :], other=0.0)


@triton.jit
def attend_tile(q, k, v, scale, hidden, own, absent, top, total, acc):
    """One step of the running softmax: keys [K, D] and values [K, V], with `scale` of their logits [K]."""
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale[None, :]
    s = tl.where(s > LARGEST, LARGEST, tl.where(s < -LARGEST, -LARGEST, s))  # NaN stays
    s = tl.where(hidden, -LARGEST, s)
    s = tl.where(own, SELF, s)
    s = tl.where((s != s) | absent[None, :], float("-inf"), s)
    new = tl.maximum(top, tl.max(s, 1))
    shift = tl.maximum(new, -LARGEST)
    p = tl.exp(s - shift[:, None]).to(v.dtype)
    faded = tl.exp(top - shift)
    total = total * faded + tl.sum(p.to(tl.float32), 1)  # of the rounded weights: they sum to one
    acc = tl.dot(p, v, acc * faded[:, None], input_precision="ieee")
    return new, total, acc


@triton.jit(
    do_not_specialize=["heads", "q_tokens", "k_tokens", "clusters", "queries", "keys", "memory", "tiles", "scale"]
)
def attend_kernel(
    q_ptr, k_ptr, v_ptr, q_member_ptr, k_member_ptr, memory_k_ptr, memory_v_ptr, q_mask_ptr, k_mask_ptr, rows_ptr,
    heads, q_tokens, k_tokens, clusters, queries, keys, memory, tiles, width, value_width, scale,
    q_stride_b, q_stride_h, q_stride_n, q_stride_d, k_stride_b, k_stride_h, k_stride_n, k_stride_d,
    v_stride_b, v_stride_h, v_stride_n, v_stride_d,
    CAUSAL: tl.constexpr, SHARED: tl.constexpr, Q_MASKED: tl.constexpr, K_MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, DEPTH: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """rows [B H, C, w, dv] float32: BLOCK_M queries of one cluster."""
    program = tl.program_id(0)
    place = program // tiles  # head * clusters + cluster, heads counted over the batch
    head = place // clusters
    batch, h = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    o_m = program % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d, o_v = tl.arange(0, DEPTH), tl.arange(0, VALUES)
    p_member = q_member_ptr + place.to(tl.int64) * queries
    i = tl.load(p_member + o_m, mask=o_m < queries, other=-1)
    real = (i >= 0) & (i < q_tokens)
    p_q = q_ptr + batch * q_stride_b + h * q_stride_h
    q = load_rows(p_q, i, real, o_d, width, q_stride_n, q_stride_d)
    blind = tl.zeros((BLOCK_M,), tl.int1)
    if Q_MASKED:
        blind = tl.load(q_mask_ptr + batch * q_tokens + i, mask=real, other=1) == 0
    top = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, VALUES), tl.float32)
    slot = (h * clusters + place % clusters) * memory
    nowhere = tl.zeros((BLOCK_M, BLOCK_K), tl.int1)
    for start in range(0, memory, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        m_k = o_k < memory
        k = load_rows(memory_k_ptr + slot * width, o_k, m_k, o_d, width, width, 1).to(q.dtype)
        v = load_rows(memory_v_ptr + slot * value_width, o_k, m_k, o_v, value_width, value_width, 1).to(q.dtype)
        scales = tl.zeros((BLOCK_K,), tl.float32) + scale
        top, total, acc = attend_tile(q, k, v, scales, nowhere, nowhere, o_k >= memory, top, total, acc)
    p_k = k_ptr + batch * k_stride_b + h * k_stride_h
    p_v = v_ptr + batch * v_stride_b + h * v_stride_h
    p_member = k_member_ptr + place.to(tl.int64) * keys
    for start in range(0, keys, BLOCK_K):
        o_k = start + tl.arange(0, BLOCK_K)
        j = tl.load(p_member + o_k, mask=o_k < keys, other=-1)
        m_k = (j >= 0) & (j < k_tokens)
        k = load_rows(p_k, j, m_k, o_d, width, k_stride_n, k_stride_d)
        v = load_rows(p_v, j, m_k, o_v, value_width, v_stride_n, v_stride_d)
        scales = tl.zeros((BLOCK_K,), tl.float32) + scale
        own = nowhere
        if SHARED:  # a power of two brings long keys into range, exactly; their length goes into the logits
            wide = k.to(tl.float32)
            span = tl.where(tl.max(tl.abs(wide), 1) > FAR, RANGE, 1.0)
            wide = wide * span[:, None]
            k = wide.to(q.dtype)
            scales = scale / tl.maximum(tl.sqrt(tl.sum(wide * wide, 1)), NORM_EPSILON * span)
            own = i[:, None] == j[None, :]
        hidden = nowhere | blind[:, None]
        if CAUSAL:
            hidden = hidden | (i[:, None] < j[None, :])
        if K_MASKED:
            hidden = hidden | (tl.load(k_mask_ptr + batch * k_tokens + j, mask=m_k, other=1) == 0)[None, :]
        top, total, acc = attend_tile(q, k, v, scales, hidden, own, o_k >= keys, top, total, acc)
    p_out = rows_ptr + (place.to(tl.int64) * queries + o_m)[:, None] * value_width + o_v[None, :]
    tl.store(p_out, acc / total[:, None], mask=(o_m < queries)[:, None] & (o_v < value_width)[None, :])


@triton.jit(do_not_specialize=["tokens", "slots", "blocks"])
def combine_kernel(
    rows_ptr, slot_ptr, start_ptr, out_ptr, tokens, slots, blocks, width,
    BLOCK_N: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """out [B H, N, dv]: the mean of each token's rows, slot_ptr[start[n]] to slot_ptr[start[n + 1]]."""
    head = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    o_v = tl.arange(0, VALUES)
    m_n = o_n < tokens
    p_start = start_ptr + head * (tokens + 1) + o_n
    begin = tl.load(p_start, mask=m_n, other=0).to(tl.int32)
    count = tl.load(p_start + 1, mask=m_n, other=0).to(tl.int32) - begin
    acc = tl.zeros((BLOCK_N, VALUES), tl.float32)
    for step in range(0, tl.max(count, 0)):
        m_row = step < count
        slot = tl.load(slot_ptr + head * slots + begin + step, mask=m_row, other=0)
        p_row = rows_ptr + (head * slots + slot)[:, None] * width + o_v[None, :]
        acc += tl.load(p_row, mask=m_row[:, None] & (o_v < width)[None, :], other=0.0)
    acc = acc / (count.to(tl.float32) + MEAN_EPSILON)[:, None]
    p_out = out_ptr + (head * tokens + o_n)[:, None] * width + o_v[None, :]
    tl.store(p_out, acc.to(out_ptr.dtype.element_ty), mask=m_n[:, None] & (o_v < width)[None, :])


def padded(width: int) -> int:
    """The width of a tile that holds `width` columns."""
    return max(16, triton.next_power_of_2(width))


def tile_of(dtype: torch.dtype, width: int) -> tuple[int, int, int, int]:
    """Queries, keys, warps and stages of a tile of `width` columns."""
    return (FLOAT32_TILES if dtype == torch.float32 else TILES)[min(256, max(64, width))]


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_members: torch.Tensor, k_members: torch.Tensor,
    memory_k: torch.Tensor, memory_v: torch.Tensor, q_mask: torch.Tensor, k_mask: torch.Tensor,
    scale: float, causal: bool, shared_qk: bool,
) -> torch.Tensor:  # fmt: skip
    """Attention in clusters [B, H, N, dv]; the contract of the op."""
    (batch, heads, tokens, width), value_width = q.shape, v.shape[3]
    clusters, queries, keys, memory = *q_members.shape[2:], k_members.shape[3], memory_k.shape[2]
    out = torch.empty(batch, heads, tokens, value_width, dtype=q.dtype, device=q.device)
    if out.numel() == 0 or clusters * queries * (keys + memory) == 0:
        return out.zero_()
    if max(width, value_width) > WIDEST:
        arguments = (q, k, v, q_members, k_members, memory_k, memory_v, q_mask, k_mask)
        return cluster_attention_reference(*arguments, scale, causal, shared_qk)
    q_members, k_members = q_members.contiguous(), k_members.contiguous()
    memory_k, memory_v = memory_k.contiguous(), memory_v.contiguous()
    q_mask, k_mask = (mask.contiguous().view(torch.uint8) for mask in (q_mask, k_mask))
    depth, values = padded(width), padded(value_width)
    block_m, block_k, warps, stages = tile_of(q.dtype, max(depth, values))
    slots, tiles, blocks = clusters * queries, triton.cdiv(queries, block_m), triton.cdiv(tokens, BLOCK_N)
    rows = torch.empty(batch * heads * slots * value_width, dtype=torch.float32, device=q.device)
    found = q_members.view(batch * heads, slots).sort(dim=1, stable=True)
    every = torch.arange(tokens + 1, dtype=torch.int32, device=q.device).expand(batch * heads, -1)
    starts = torch.searchsorted(found.values, every.contiguous())
    with torch.cuda.device_of(q):
        attend_kernel[(batch * heads * clusters * tiles,)](
            q, k, v, q_members, k_members, memory_k, memory_v, q_mask, k_mask, rows, heads, tokens, k.shape[2],
            clusters, queries, keys, memory, tiles, width, value_width, scale, *q.stride(), *k.stride(), *v.stride(),
            CAUSAL=causal, SHARED=shared_qk, Q_MASKED=q_mask.numel() > 0, K_MASKED=k_mask.numel() > 0,
            BLOCK_M=block_m, BLOCK_K=block_k, DEPTH=depth, VALUES=values,
            num_warps=warps, num_stages=stages,
        )  # fmt: skip
        combine_kernel[(batch * heads * blocks,)](
            rows, found.indices, starts, out, tokens, slots, blocks, value_width,
            BLOCK_N=BLOCK_N, VALUES=values, num_warps=4,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    indices = {"q_member_ptr": "*i32", "k_member_ptr": "*i32", "q_mask_ptr": "*u8", "k_mask_ptr": "*u8"}
    made = []
    for dtype, kind in (("*fp32", torch.float32), ("*bf16", torch.bfloat16)):
        tensors = {name: dtype for name in ("q_ptr", "k_ptr", "v_ptr")}
        for width, shared in ((64, False), (64, True), (128, True)):
            block_m, block_k, warps, stages = tile_of(kind, width)
            flags = {"CAUSAL": shared, "SHARED": shared, "Q_MASKED": True, "K_MASKED": True}
            tile = {"BLOCK_M": block_m, "BLOCK_K": block_k, "DEPTH": width, "VALUES": width}
            unit = {"q_stride_d": 1, "k_stride_d": 1, "v_stride_d": 1}
            made.append(
                StaticKernel(attend_kernel, {**indices, **tensors}, {"scale": "fp32"}, {**flags, **tile, **unit},
                             num_warps=warps, num_stages=stages, tensor_core=dtype == "*bf16" and width == 64,
                             aligned=("width", "value_width"))
            )  # fmt: skip
        made.append(
            StaticKernel(combine_kernel, {"slot_ptr": "*i64", "start_ptr": "*i64", "out_ptr": dtype},
                         constants={"BLOCK_N": BLOCK_N, "VALUES": 64}, aligned=("width",))
        )  # fmt: skip
    return made


STATIC = _static()
