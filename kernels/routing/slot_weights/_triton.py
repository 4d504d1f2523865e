"""slot_weights on the GPU in two launches: columns (dispatch weights and the slots' moments), then rows.

A program walks over its columns (rows) a few times: highest logit and counts, sums, results. What it reads again comes
from the caches: the logits of an image are some hundred kilobytes. No atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_N, BLOCK_C, BLOCK_R = 32, 32, 4  # tokens and slots of a tile of columns; tokens of a tile of rows
ROW_C = 128  # slots of a tile of rows
LARGEST = tl.constexpr(1e38)
EPSILON = tl.constexpr(1e-5)  # of the variance
ROW_EPSILON = tl.constexpr(1e-6)


@triton.jit
def load_tile(
    p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED: tl.constexpr, MASKED: tl.constexpr
):
    """Logits as they count (-inf: not at all), which are NaN, and which are of tokens that are kept."""
    kept = (o_n < tokens)[:, None] & (o_s < slots)[None, :]
    p_tile = p_image + o_n.to(tl.int64)[:, None] * stride_n + o_s.to(tl.int64)[None, :] * stride_s
    x = tl.load(p_tile, mask=kept, other=0.0).to(tl.float32)
    if SCALED:
        x *= tl.load(p_scale + o_n, mask=o_n < tokens, other=1.0)[:, None]
    if MASKED:
        kept = kept & (tl.load(p_mask + o_n, mask=o_n < tokens, other=0) != 0)[:, None]
    x = tl.where(x > LARGEST, LARGEST, x)
    return tl.where(kept & (x == x), x, float("-inf")), kept & (x != x), kept


@triton.jit(do_not_specialize=["tokens", "slots", "blocks"])
def column_kernel(
    logits_ptr, scale_ptr, mask_ptr, dispatch_ptr, moments_ptr, tokens, slots, blocks, stride_b, stride_n, stride_s,
    SCALED: tl.constexpr, MASKED: tl.constexpr, LINEAR: tl.constexpr, SCALE_DISPATCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Dispatch weights of BLOCK_C slots of an image; its moments: highest logit, rest of the mean, 1 / deviation."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    o_s = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    p_image = logits_ptr + image * stride_b
    p_scale, p_mask = scale_ptr + image * tokens, mask_ptr + image * tokens
    top = tl.full((BLOCK_C,), float("-inf"), tl.float32)
    counted = tl.zeros((BLOCK_C,), tl.float32)
    unknown = tl.zeros((BLOCK_C,), tl.int32)
    present = tl.zeros((BLOCK_C,), tl.int32)
    for start in range(0, tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        x, nan, kept = load_tile(p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED)
        top = tl.maximum(top, tl.max(x, 0))
        counted += tl.sum((x > float("-inf")).to(tl.float32), 0)
        unknown += tl.sum(nan.to(tl.int32), 0)
        present += tl.sum(kept.to(tl.int32), 0)
    shift = tl.maximum(top, -LARGEST)
    total = tl.zeros((BLOCK_C,), tl.float32)
    rest = tl.zeros((BLOCK_C,), tl.float32)
    high = tl.where(top > float("-inf"), top, 0.0)
    share = 1.0 / tl.maximum(counted, 1.0)
    for start in range(0, tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        x, nan, kept = load_tile(p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED)
        total += tl.sum(tl.exp(x - shift[None, :]), 0)
        if LINEAR:
            rest += tl.sum(tl.where(x > float("-inf"), (x - high[None, :]) * share[None, :], 0.0), 0)
    if LINEAR:  # deviations are brought below one before they are squared
        widest = tl.full((BLOCK_C,), 1e-15, tl.float32)
        for start in range(0, tokens, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            x, nan, kept = load_tile(
                p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED
            )
            d = tl.where(x > float("-inf"), x - high[None, :] - rest[None, :], 0.0)
            widest = tl.maximum(widest, tl.max(tl.abs(d), 0))
        squares = tl.zeros((BLOCK_C,), tl.float32)
        for start in range(0, tokens, BLOCK_N):
            o_n = start + tl.arange(0, BLOCK_N)
            x, nan, kept = load_tile(
                p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED
            )
            d = tl.where(x > float("-inf"), x - high[None, :] - rest[None, :], 0.0) / widest[None, :]
            squares += tl.sum(d * d, 0)
        inverse = 1.0 / tl.sqrt(squares * share + EPSILON / widest / widest) / widest
        p_moments = moments_ptr + image * 3 * slots + o_s
        tl.store(p_moments, high, mask=o_s < slots)
        tl.store(p_moments + slots, rest, mask=o_s < slots)
        tl.store(p_moments + 2 * slots, inverse, mask=o_s < slots)
    factor = 1.0 / tl.maximum(total, 1.0)
    nothing = tl.where((unknown == present) & (unknown > 0), float("nan"), 0.0)
    for start in range(0, tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        x, nan, kept = load_tile(p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED)
        value = tl.exp(x - shift[None, :]) * factor[None, :]
        if SCALE_DISPATCH:
            value *= tl.load(p_scale + o_n, mask=o_n < tokens, other=0.0)[:, None]
        value = tl.where(x > float("-inf"), value, 0.0) + nothing[None, :]
        p_out = dispatch_ptr + (image * tokens + o_n)[:, None] * slots + o_s[None, :]
        tl.store(p_out, value, mask=(o_n < tokens)[:, None] & (o_s < slots)[None, :])


@triton.jit
def features(x, p_moments, o_s, slots):
    """phi of the standardised logits; 0 where they do not count."""
    inside = o_s < slots
    high = tl.load(p_moments + o_s, mask=inside, other=0.0)
    rest = tl.load(p_moments + slots + o_s, mask=inside, other=0.0)
    inverse = tl.load(p_moments + 2 * slots + o_s, mask=inside, other=0.0)
    h = (x - high[None, :] - rest[None, :]) * inverse[None, :]
    phi = tl.where(h > 0.0, h + 1.0, tl.exp(tl.minimum(h, 0.0)))
    return tl.where(x > float("-inf"), phi, 0.0)


@triton.jit(do_not_specialize=["tokens", "slots", "blocks"])
def row_kernel(
    logits_ptr, scale_ptr, mask_ptr, combine_ptr, moments_ptr, tokens, slots, blocks, stride_b, stride_n, stride_s,
    SCALED: tl.constexpr, MASKED: tl.constexpr, LINEAR: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Combine weights of BLOCK_N tokens of one image."""
    image = (tl.program_id(0) // blocks).to(tl.int64)
    o_n = tl.program_id(0) % blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    p_image, p_moments = logits_ptr + image * stride_b, moments_ptr + image * 3 * slots
    p_scale, p_mask = scale_ptr + image * tokens, mask_ptr + image * tokens
    top = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    unknown = tl.zeros((BLOCK_N,), tl.int32)
    for start in range(0, slots, BLOCK_C):
        o_s = start + tl.arange(0, BLOCK_C)
        x, nan, _ = load_tile(p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED)
        top = tl.maximum(top, tl.max(x, 1))
        unknown += tl.sum(nan.to(tl.int32), 1)
    shift = tl.maximum(top, -LARGEST)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, slots, BLOCK_C):
        o_s = start + tl.arange(0, BLOCK_C)
        x, _, _ = load_tile(p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED)
        if LINEAR:
            total += tl.sum(features(x, p_moments, o_s, slots), 1)
        else:
            total += tl.sum(tl.exp(x - shift[:, None]), 1)
    factor = 1.0 / (total + ROW_EPSILON if LINEAR else tl.maximum(total, 1.0))
    nothing = tl.where(unknown == slots, float("nan"), 0.0)
    for start in range(0, slots, BLOCK_C):
        o_s = start + tl.arange(0, BLOCK_C)
        x, _, _ = load_tile(p_image, p_scale, p_mask, o_n, o_s, tokens, slots, stride_n, stride_s, SCALED, MASKED)
        value = features(x, p_moments, o_s, slots) if LINEAR else tl.exp(x - shift[:, None])
        p_out = combine_ptr + (image * tokens + o_n)[:, None] * slots + o_s[None, :]
        mask = (o_n < tokens)[:, None] & (o_s < slots)[None, :]
        tl.store(p_out, value * factor[:, None] + nothing[:, None], mask=mask)


def launch(
    logits: torch.Tensor, scale: torch.Tensor, mask: torch.Tensor, weighting: str, scale_dispatch: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dispatch and combine weights [B, N, S]; the contract is that of `weigh_slots`."""
    batch, tokens, slots = logits.shape
    made = [torch.empty(logits.shape, dtype=torch.float32, device=logits.device) for _ in range(2)]
    if logits.numel() == 0:
        return made[0], made[1]
    linear = weighting == "linear"
    scale, mask = scale.contiguous(), mask.contiguous().view(torch.uint8)
    moments = torch.empty(batch, 3 if linear else 0, slots, dtype=torch.float32, device=logits.device)
    constants = {"SCALED": scale.numel() > 0, "MASKED": mask.numel() > 0, "LINEAR": linear}
    with torch.cuda.device_of(logits):
        blocks = triton.cdiv(slots, BLOCK_C)
        column_kernel[(batch * blocks,)](
            logits, scale, mask, made[0], moments, tokens, slots, blocks, *logits.stride(), **constants,
            SCALE_DISPATCH=scale_dispatch, BLOCK_N=BLOCK_N, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
        blocks = triton.cdiv(tokens, BLOCK_R)
        row_kernel[(batch * blocks,)](
            logits, scale, mask, made[1], moments, tokens, slots, blocks, *logits.stride(), **constants,
            BLOCK_N=BLOCK_R, BLOCK_C=ROW_C, num_warps=4,
        )  # fmt: skip
    return made[0], made[1]


def _static() -> list[StaticKernel]:
    made = []
    for linear in (False, True):
        pointers = {"mask_ptr": "*u8"}
        constants = {"SCALED": True, "MASKED": True, "LINEAR": linear, "stride_s": 1}
        columns = {**constants, "SCALE_DISPATCH": True, "BLOCK_N": BLOCK_N, "BLOCK_C": BLOCK_C}
        rows = {**constants, "BLOCK_N": BLOCK_R, "BLOCK_C": ROW_C}
        made += [
            StaticKernel(column_kernel, pointers, constants=columns),
            StaticKernel(row_kernel, pointers, constants=rows),
        ]
    return made


STATIC = _static()
