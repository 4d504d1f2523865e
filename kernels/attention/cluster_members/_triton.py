"""cluster_members on the GPU: scores of some clusters against all tokens, then a radix select in each cluster's row.

The select reads its row five times, from the caches where N is moderate: a histogram for each byte of the score, which
gives the lowest chosen score exactly, and a pass that writes what is above it, and the first of what equals it, in
order. No atomics in memory, and no sort: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_N, BLOCK_C, BLOCK_D = 64, 32, 32  # tile of scores
SELECT_N = 1024
SCORES = 1 << 26  # float32 of scratch: clusters are taken in runs that fit
EPSILON = tl.constexpr(1e-12)
FAR = tl.constexpr(1e18)  # squares of larger numbers may leave the range
RANGE = tl.constexpr(2.0**-80)


@triton.jit(do_not_specialize=["heads", "tokens", "clusters", "first", "count", "token_tiles", "cluster_tiles"])
def score_kernel(
    x_ptr, centroid_ptr, score_ptr, heads, tokens, width, clusters, first, count, token_tiles, cluster_tiles,
    stride_b, stride_h, stride_n, stride_d,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """scores [B H, count, N] of clusters first to first + count - 1; NaN as -inf, -0 as 0."""
    program = tl.program_id(0)
    cluster_tile = program % cluster_tiles
    token_tile = program // cluster_tiles % token_tiles
    head = program // cluster_tiles // token_tiles  # over the batch
    o_n = token_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_c = cluster_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    m_n, m_c = o_n < tokens, o_c < count
    p_head = x_ptr + (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    p_x = p_head + o_n.to(tl.int64)[:, None] * stride_n
    p_mean = centroid_ptr + ((head % heads).to(tl.int64) * clusters + first + o_c)[:, None] * width
    largest = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_x = m_n[:, None] & (o_d < width)[None, :]
        x = tl.load(p_x + o_d.to(tl.int64)[None, :] * stride_d, mask=m_x, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, tl.max(tl.abs(x), 1))
    span = tl.where(largest > FAR, RANGE, 1.0)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    score = tl.zeros((BLOCK_C, BLOCK_N), tl.float32)
    for start in range(0, width, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_x = m_n[:, None] & (o_d < width)[None, :]
        x = tl.load(p_x + o_d.to(tl.int64)[None, :] * stride_d, mask=m_x, other=0.0).to(tl.float32) * span[:, None]
        mean = tl.load(p_mean + o_d[None, :], mask=m_c[:, None] & (o_d < width)[None, :], other=0.0)
        squares += tl.sum(x * x, 1)
        score = tl.dot(mean, tl.trans(x), score, input_precision="ieee")
    score = score / tl.maximum(tl.sqrt(squares), EPSILON * span)[None, :]
    score = tl.where(score == score, score, float("-inf"))
    score = tl.where(score == 0.0, 0.0, score)
    p_out = score_ptr + (head.to(tl.int64) * count + o_c)[:, None] * tokens + o_n[None, :]
    tl.store(p_out, score, mask=m_c[:, None] & m_n[None, :])


@triton.jit
def load_keys(p_score, o_n, tokens):
    """Scores as unsigned integers of the same order."""
    bits = tl.load(p_score + o_n, mask=o_n < tokens, other=0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize=["tokens", "clusters", "first", "count", "window"])
def select_kernel(score_ptr, member_ptr, tokens, clusters, first, count, window, SELECT_N: tl.constexpr):
    """The `window` largest scores of one row: their indices, ascending; of equal scores the lowest indices."""
    row = tl.program_id(0)
    p_score = score_ptr + row.to(tl.int64) * tokens
    o_digit = tl.arange(0, 256)
    known = tl.zeros((), tl.int32)  # the bytes of the lowest chosen score that are known
    wanted = window
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        seen = tl.zeros((256,), tl.int32)
        for start in range(0, tokens, SELECT_N):
            o_n = start + tl.arange(0, SELECT_N)
            key = load_keys(p_score, o_n, tokens) >> shift
            agrees = (key >> 8) == (known.to(tl.uint32, bitcast=True) >> shift >> 8)
            seen += tl.histogram((key & 255).to(tl.int32), 256, mask=agrees & (o_n < tokens))
        above = tl.sum(seen, 0) - tl.cumsum(seen, 0)  # with a larger byte
        digit = tl.sum((above >= wanted).to(tl.int32), 0)
        wanted -= tl.sum(tl.where(o_digit == digit, above, 0), 0)
        known = known | (digit << shift)
    lowest = known.to(tl.uint32, bitcast=True)
    place = row // count * clusters + first + row % count
    p_out = member_ptr + place.to(tl.int64) * window
    written = tl.zeros((), tl.int32)
    ties = tl.zeros((), tl.int32)
    for start in range(0, tokens, SELECT_N):
        o_n = start + tl.arange(0, SELECT_N)
        key = load_keys(p_score, o_n, tokens)
        tied = ((key == lowest) & (o_n < tokens)).to(tl.int32)
        first_ties = (tied > 0) & (ties + tl.cumsum(tied, 0) <= wanted)
        kept = (((key > lowest) & (o_n < tokens)) | first_ties).to(tl.int32)
        tl.store(p_out + written + tl.cumsum(kept, 0) - 1, o_n, mask=kept > 0)
        written += tl.sum(kept, 0)
        ties += tl.sum(tied, 0)


def launch(x: torch.Tensor, centroids: torch.Tensor, window: int) -> torch.Tensor:
    """Members [B, H, C, w] int32; the contract of the op."""
    batch, heads, tokens, width = x.shape
    clusters = centroids.shape[1]
    members = torch.empty(batch, heads, clusters, window, dtype=torch.int32, device=x.device)
    if members.numel() == 0:
        return members
    centroids = centroids.contiguous()
    run = min(clusters, max(1, SCORES // (batch * heads * tokens)))
    scores = torch.empty(batch * heads * run * tokens, dtype=torch.float32, device=x.device)
    token_tiles = triton.cdiv(tokens, BLOCK_N)
    with torch.cuda.device_of(x):
        for first in range(0, clusters, run):
            count = min(run, clusters - first)
            cluster_tiles = triton.cdiv(count, BLOCK_C)
            score_kernel[(batch * heads * token_tiles * cluster_tiles,)](
                x, centroids, scores, heads, tokens, width, clusters, first, count, token_tiles, cluster_tiles,
                *x.stride(), BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, BLOCK_D=BLOCK_D, num_warps=8,
            )  # fmt: skip
            select_kernel[(batch * heads * count,)](
                scores, members, tokens, clusters, first, count, window, SELECT_N=SELECT_N, num_warps=4
            )
    return members


def _static() -> list[StaticKernel]:
    tile = {"BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C, "BLOCK_D": BLOCK_D, "stride_d": 1}
    made = [StaticKernel(score_kernel, {"x_ptr": x}, constants=tile, num_warps=8) for x in ("*fp32", "*bf16")]
    return [*made, StaticKernel(select_kernel, {"member_ptr": "*i32"}, constants={"SELECT_N": SELECT_N})]


STATIC = _static()
