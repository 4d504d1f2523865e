"""The kernels of sparse_encoding on the GPU; `_triton.py` says how they work together.

A key is 64 bits: the float32 magnitude of an active score, 2^31 - 1 - index, and the sign. Magnitudes are positive, so
keys sort as (magnitude, then lower index), no two of a token are equal, and 0 stands for a latent that is not active.
"""

import triton
import triton.language as tl

ABSOLUTE, JUMP = tl.constexpr(1), tl.constexpr(2)
LAST_INDEX = tl.constexpr(2147483647)


@triton.jit
def score_tile(
    x_ptr, weight_ptr, bias_ptr, o_t, m_t, o_m, m_m, channels, x_stride_t, x_stride_d, stride_m, stride_d,
    HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scores [BLOCK_T, BLOCK_N] in float32: the same bits in every walk, as the order of the sum is fixed."""
    acc = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    p_x = x_ptr + o_t.to(tl.int64)[:, None] * x_stride_t
    p_w = weight_ptr + o_m.to(tl.int64)[None, :] * stride_m
    for begin in range(0, channels, BLOCK_D):
        o_d = begin + tl.arange(0, BLOCK_D)
        m_d = o_d < channels
        x = tl.load(p_x + o_d.to(tl.int64)[None, :] * x_stride_d, mask=m_t[:, None] & m_d[None, :], other=0.0)
        w = tl.load(p_w + o_d.to(tl.int64)[:, None] * stride_d, mask=m_m[None, :] & m_d[:, None], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def keys_of(h, theta_ptr, o_m, m_m, MODE: tl.constexpr):
    """Keys [BLOCK_T, BLOCK_N] of scores; 0 where a latent is not active."""
    size = tl.abs(h) if MODE == ABSOLUTE else h
    active = (size > 0.0) & m_m[None, :]
    if MODE == JUMP:
        theta = tl.load(theta_ptr + o_m, mask=m_m, other=0.0).to(tl.float32)
        active = active & (h >= theta[None, :])
    low = ((o_m ^ LAST_INDEX).to(tl.int64) << 1)[None, :] | (h < 0.0).to(tl.int64)
    return tl.where(active, (size.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low, 0)


@triton.jit(do_not_specialize=["first", "tokens", "latents", "groups", "splits"])
def group_kernel(
    x_ptr, weight_ptr, bias_ptr, theta_ptr, table_ptr, active_ptr, known_ptr,
    first, tokens, latents, channels, groups, splits, x_stride_t, x_stride_d, stride_m, stride_d,
    MODE: tl.constexpr, HAS_BIAS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """table[token, group] = largest key of GROUP latents; adds up active latents and scores that are not NaN."""
    o_local = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_local < tokens
    active = tl.zeros((BLOCK_T,), tl.int32)
    known = tl.zeros((BLOCK_T,), tl.int32)
    for tile in range(tl.program_id(0) % splits, (latents + BLOCK_N - 1) // BLOCK_N, splits):
        o_m = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m = o_m < latents
        h = score_tile(x_ptr, weight_ptr, bias_ptr, first + o_local, m_t, o_m, m_m, channels, x_stride_t, x_stride_d,
                       stride_m, stride_d, HAS_BIAS, BLOCK_T, BLOCK_N, BLOCK_D)  # fmt: skip
        key = keys_of(h, theta_ptr, o_m, m_m, MODE)
        active += tl.sum((key > 0).to(tl.int32), 1)
        known += tl.sum(((h == h) & m_m[None, :]).to(tl.int32), 1)
        best = tl.max(tl.reshape(key, (BLOCK_T, BLOCK_N // GROUP, GROUP)), 2)
        o_g = tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
        p_table = table_ptr + o_local.to(tl.int64)[:, None] * groups + o_g[None, :]
        tl.store(p_table, best, mask=m_t[:, None] & (o_g < groups)[None, :])
    tl.atomic_add(active_ptr + first + o_local, active, mask=m_t, sem="relaxed")
    tl.atomic_add(known_ptr + first + o_local, known, mask=m_t, sem="relaxed")


@triton.jit
def kth_largest(p_key, count, k, SCAN: tl.constexpr):
    """The k-th largest of `count` keys, or 1 where fewer are positive; three bits of it at a time."""
    digit = tl.arange(0, 8)
    found = count.to(tl.int64) * 0
    for step in range(21):
        trial = found + (digit.to(tl.int64) << (60 - 3 * step))
        above = tl.zeros((8,), tl.int32)
        for start in range(0, count, SCAN):
            o_key = start + tl.arange(0, SCAN)
            key = tl.load(p_key + o_key, mask=o_key < count, other=0)
            above += tl.sum((key[None, :] >= trial[:, None]).to(tl.int32), 1)
        found = tl.max(tl.where((above >= k) | (digit == 0), trial, 0), 0)
    return tl.maximum(found, 1)


@triton.jit(do_not_specialize=["groups", "k"])
def bound_kernel(table_ptr, bound_ptr, groups, k, SCAN: tl.constexpr):
    """bound[token] = k-th largest group maximum: k groups hold a latent at least that large, and no others do."""
    row = tl.program_id(0).to(tl.int64)
    tl.store(bound_ptr + row, kth_largest(table_ptr + row * groups, groups, k, SCAN))


@triton.jit(do_not_specialize=["first", "tokens", "latents", "slots", "width", "splits"])
def filter_kernel(
    x_ptr, weight_ptr, bias_ptr, theta_ptr, bound_ptr, stored_ptr, slot_ptr,
    first, tokens, latents, channels, slots, width, splits, x_stride_t, x_stride_d, stride_m, stride_d,
    MODE: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Append to slot[token] the keys that reach the bound: at most GROUP * k, or all there are. Their order is open."""
    o_local = tl.program_id(0) // splits * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_local < tokens
    bound = tl.load(bound_ptr + o_local, mask=m_t, other=1)
    for tile in range(tl.program_id(0) % splits, (latents + BLOCK_N - 1) // BLOCK_N, splits):
        o_m = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        m_m = o_m < latents
        h = score_tile(x_ptr, weight_ptr, bias_ptr, first + o_local, m_t, o_m, m_m, channels, x_stride_t, x_stride_d,
                       stride_m, stride_d, HAS_BIAS, BLOCK_T, BLOCK_N, BLOCK_D)  # fmt: skip
        key = keys_of(h, theta_ptr, o_m, m_m, MODE)
        kept = ((key >= bound[:, None]) & m_t[:, None]).to(tl.int32)
        kept_of_row = tl.sum(kept, 1)
        if tl.sum(kept_of_row, 0) > 0:
            start = tl.atomic_add(stored_ptr + first + o_local, kept_of_row, mask=kept_of_row > 0, sem="relaxed")
            position = start[:, None] + tl.cumsum(kept, 1) - 1
            p_slot = slot_ptr + o_local.to(tl.int64)[:, None] * width + position
            tl.store(p_slot, key, mask=(kept > 0) & (position < slots))


@triton.jit(do_not_specialize=["first", "latents", "slots", "width", "k"])
def select_kernel(
    active_ptr, known_ptr, stored_ptr, slot_ptr, value_ptr, index_ptr, count_ptr, first, latents, slots, width, k,
    MODE: tl.constexpr, BLOCK_S: tl.constexpr, SCAN: tl.constexpr,
):  # fmt: skip
    """The k largest keys of one token, sorted and unpacked; BLOCK_S: k rounded up to a power of two."""
    row = tl.program_id(0).to(tl.int64)
    token = first + row
    p_slot = slot_ptr + row * width
    stored = tl.minimum(tl.load(stored_ptr + token), slots)
    p_best = p_slot
    if stored > BLOCK_S:  # to the place behind the slots, the k best of them
        last = kth_largest(p_slot, stored, k, SCAN)
        p_best = p_slot + slots
        written = 0
        for start in range(0, stored, SCAN):
            o_key = start + tl.arange(0, SCAN)
            key = tl.load(p_slot + o_key, mask=o_key < stored, other=0)
            kept = (key >= last).to(tl.int32)
            tl.store(p_best + written + tl.cumsum(kept, 0) - 1, key, mask=kept > 0)
            written += tl.sum(kept, 0)
        stored = written
        tl.debug_barrier()
    o_s = tl.arange(0, BLOCK_S)
    key = tl.sort(tl.load(p_best + o_s, mask=o_s < stored, other=0), descending=True)
    size = (key >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    value = tl.where((key & 1) > 0, -size, size)
    index = tl.where(key > 0, ((key >> 1) & LAST_INDEX).to(tl.int32) ^ LAST_INDEX, -1)
    unknown = (tl.load(known_ptr + token) == 0) & (o_s < latents)  # every score is NaN
    value = tl.where(unknown, float("nan"), value)
    index = tl.where(unknown, o_s, index)
    tl.store(value_ptr + token * k + o_s, value, mask=o_s < k)
    tl.store(index_ptr + token * k + o_s, index, mask=o_s < k)
    active = tl.load(active_ptr + token)
    tl.store(count_ptr + token, active if MODE == JUMP else tl.minimum(active, k))
