"""token_routing on the GPU: a block of tokens in registers, from logits to weights; then the capacity.

`route_kernel` holds ROWS rows of logits. The groups of experts, and the experts of a group, are each padded to a
power of two, so that a row is [groups, experts of a group] and the groups are a reduction. The k best are taken one by
one: largest offer, lowest index among equals.

`capacity_kernel` walks the assignments of one group of tokens in the order in which they are served and counts per
expert in registers; a program per group, no atomics, so every run gives the same result. Nothing waits for the device.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

ROUTE_ELEMENTS, ROUTE_WARPS = 2048, 8  # of a block of at most 32 rows of logits; four warps spill on sm_90
CAPACITY_ELEMENTS = 8192  # of a block of assignments x experts
SOFTMAX, SIGMOID, TOPK_FIRST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
BEYOND = tl.constexpr(1 << 30)  # larger than any index


@triton.jit
def exponentials(x, largest):
    """e^(x - largest); 1 where both are +inf, 0 where x is -inf."""
    return tl.where(x == float("inf"), 1.0, tl.where(x == float("-inf"), 0.0, tl.exp(x - largest)))


@triton.jit
def divide(x, y):
    """x / y; 0 where y is 0."""
    return tl.where(y == 0.0, 0.0, x / tl.where(y == 0.0, 1.0, y))


@triton.jit
def shut_groups(q, real, m_g, top_groups, ZERO: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, S: tl.constexpr):
    """Offers [rows, G * S], 0 or -inf where the group is not among the best; a group counts as its two largest."""
    q3 = tl.reshape(q, (ROWS, G, S))
    o_s = tl.arange(0, S)[None, None, :]
    first = tl.max(q3, 2)
    where_first = tl.min(tl.where(q3 == first[:, :, None], o_s, S), 2)
    second = tl.max(tl.where(o_s == where_first[:, :, None], float("-inf"), q3), 2)
    count = tl.where(second == float("-inf"), first, first + second)
    o_g = tl.arange(0, G)[None, :]
    left = tl.broadcast_to(m_g[None, :], (ROWS, G)).to(tl.int32)
    for _ in range(top_groups):
        best = tl.max(tl.where(left > 0, count, float("-inf")), 1)
        lowest = tl.min(tl.where((left > 0) & (count == best[:, None]), o_g, G), 1)
        left = tl.where(o_g == lowest[:, None], 0, left)
    shut = tl.reshape(tl.broadcast_to(left[:, :, None], (ROWS, G, S)), (ROWS, G * S)) > 0
    if ZERO:
        return tl.where(shut & real & (q != float("-inf")), 0.0, q)
    return tl.where(shut, float("-inf"), q)


@triton.jit
def weigh(chosen, largest, total, eps, MODE: tl.constexpr, RENORMALIZE: tl.constexpr, EPS: tl.constexpr):
    """Weights [rows, K] of the chosen logits, not scaled; `total`: sum of e^(l - largest) over all experts."""
    top = tl.max(chosen, 1)[:, None]
    if MODE == TOPK_FIRST or (MODE == SOFTMAX and RENORMALIZE and not EPS):
        e = exponentials(chosen, top)
        a = divide(e, tl.sum(e, 1)[:, None])
    elif MODE == SOFTMAX:
        e = exponentials(chosen, largest)
        a = divide(e, tl.sum(e, 1)[:, None] + eps * total) if RENORMALIZE else divide(e, total)
    else:
        a = 1.0 / (1.0 + tl.exp(-chosen))
        if RENORMALIZE:
            far = top < -60.0  # here the sigmoid of x is e^x
            shift = tl.where(far, top, 0.0)
            e = tl.where(far, exponentials(chosen, top), a)
            rest = eps * tl.exp(-shift) if EPS else 0.0
            a = divide(e, tl.sum(e, 1)[:, None] + rest)
    return a


@triton.jit(do_not_specialize=["tokens", "experts", "k", "groups", "group_size", "top_groups", "eps", "scale"])
def route_kernel(
    logits_ptr, bias_ptr, indices_ptr, weights_ptr, tokens, experts, k, groups, group_size, top_groups, eps, scale,
    stride_t, stride_e, MODE: tl.constexpr, RENORMALIZE: tl.constexpr, EPS: tl.constexpr, BIAS: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, G: tl.constexpr, S: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """ROWS tokens; G groups of S experts and K choices are powers of two at least as large as the real numbers."""
    o_t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, G * S)
    o_e = slot // S * group_size + slot % S
    m_e = (slot // S < groups) & (slot % S < group_size)
    real = (o_t < tokens)[:, None] & m_e[None, :]
    p_logits = logits_ptr + o_t.to(tl.int64)[:, None] * stride_t + o_e.to(tl.int64)[None, :] * stride_e
    x = tl.load(p_logits, mask=real, other=0.0).to(tl.float32)
    seen = tl.max(tl.where(real & (x == x), 1, 0), 1) > 0
    x = tl.where(real & (x == x), x, float("-inf"))
    largest = tl.max(x, 1)[:, None]
    total = largest
    q = x
    if MODE == SOFTMAX and (BIAS or G > 1 or not RENORMALIZE or EPS):
        e = exponentials(x, largest)
        total = tl.sum(e, 1)[:, None]
        if BIAS or G > 1:
            q = divide(e, total)
    if MODE == SIGMOID and (BIAS or G > 1):
        q = 1.0 / (1.0 + tl.exp(-x))
    if BIAS:
        q += tl.load(bias_ptr + o_e, mask=m_e, other=0.0)[None, :]
    q = tl.where((x == float("-inf")) | (q != q), float("-inf"), q)
    if G > 1:
        q = shut_groups(q, real, tl.arange(0, G) < groups, top_groups, ZERO, ROWS, G, S)
    left = tl.broadcast_to(m_e[None, :], (ROWS, G * S))
    o_k = tl.arange(0, K)[None, :]
    index = tl.zeros((ROWS, K), tl.int32)
    chosen = tl.full((ROWS, K), float("-inf"), tl.float32)
    for j in range(k):
        best = tl.max(tl.where(left, q, float("-inf")), 1)[:, None]
        lowest = tl.min(tl.where(left & (q == best), o_e[None, :], BEYOND), 1)[:, None]
        taken = o_e[None, :] == lowest
        value = tl.max(tl.where(taken & left, x, float("-inf")), 1)[:, None]
        left = left & (o_e[None, :] != lowest)
        index = tl.where(o_k == j, lowest, index)
        chosen = tl.where(o_k == j, tl.where(best == float("-inf"), float("-inf"), value), chosen)
    a = weigh(chosen, largest, total, eps, MODE, RENORMALIZE, EPS) * scale
    a = tl.where(seen[:, None], a, float("nan"))
    mask = (o_t < tokens)[:, None] & (o_k < k)
    o_out = o_t.to(tl.int64)[:, None] * k + o_k
    tl.store(indices_ptr + o_out, index, mask=mask)
    tl.store(weights_ptr + o_out, a, mask=mask)


@triton.jit(do_not_specialize=["tokens", "k", "capacity", "size"])
def capacity_kernel(
    order_ptr, indices_ptr, weights_ptr, tokens, k, capacity, size,
    BY_SCORE: tl.constexpr, ROWS: tl.constexpr, E: tl.constexpr,
):  # fmt: skip
    """One group of `size` tokens: all first choices, then all second choices; beyond `capacity`: index -1, weight 0."""
    first = tl.program_id(0) * size
    last = tl.minimum(first + size, tokens)
    o_e = tl.arange(0, E)[None, :]
    used = tl.zeros((E,), tl.int32)
    for j in range(k):
        for start in range(first, last, ROWS):
            o_t = start + tl.arange(0, ROWS)
            mask = o_t < last
            token = tl.load(order_ptr + o_t, mask=mask, other=0) if BY_SCORE else o_t
            p = token.to(tl.int64) * k + j
            e = tl.load(indices_ptr + p, mask=mask, other=-1)
            hit = (e[:, None] == o_e).to(tl.int32)
            place = tl.sum((used[None, :] + tl.cumsum(hit, 0) - hit) * hit, 1)
            over = mask & (place >= capacity)
            tl.store(indices_ptr + p, -1, mask=over)
            tl.store(weights_ptr + p, 0.0, mask=over)
            used += tl.sum(hit, 0)


def route_tile(experts: int, groups: int, k: int) -> dict[str, int]:
    """Sizes of a block, powers of two."""
    g, s = triton.next_power_of_2(groups), triton.next_power_of_2(experts // groups)
    return {"ROWS": max(1, min(32, ROUTE_ELEMENTS // (g * s))), "G": g, "S": s, "K": triton.next_power_of_2(k)}


def capacity_tile(experts: int) -> dict[str, int]:
    """Sizes of a block, powers of two."""
    e = triton.next_power_of_2(experts)
    return {"ROWS": max(2, min(64, CAPACITY_ELEMENTS // e)), "E": e}


def launch(
    logits: torch.Tensor, bias: torch.Tensor, k: int, score: str, order: str, renormalize: bool, eps: float,
    scale: float, groups: int, top_groups: int, mask_with_zero: bool, capacity: int, capacity_group: int, priority: str,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Weights [T, k] float32 and indices [T, k] int32; the contract is that of `route_tokens`."""
    (tokens, experts), device = logits.shape, logits.device
    indices = torch.empty(tokens, k, dtype=torch.int32, device=device)
    weights = torch.empty(tokens, k, dtype=torch.float32, device=device)
    if tokens == 0:
        return weights, indices
    mode = 2 if order == "topk_then_softmax" else int(score == "sigmoid")
    tile = route_tile(experts, groups, k)
    with torch.cuda.device_of(logits):
        route_kernel[(triton.cdiv(tokens, tile["ROWS"]),)](
            logits, bias.contiguous(), indices, weights, tokens, experts, k, groups, experts // groups, top_groups,
            float(eps), float(scale), *logits.stride(), MODE=mode, RENORMALIZE=renormalize, EPS=eps > 0,
            BIAS=bias.numel() > 0, ZERO=mask_with_zero, **tile, num_warps=ROUTE_WARPS,
        )  # fmt: skip
        if capacity:
            size = min(capacity_group, tokens) if capacity_group else tokens
            served = _service(weights, size) if priority == "score" else indices
            capacity_kernel[(triton.cdiv(tokens, size),)](
                served, indices, weights, tokens, k, capacity, size, BY_SCORE=priority == "score",
                **capacity_tile(experts), num_warps=4,
            )  # fmt: skip
    return weights, indices


def _service(weights: torch.Tensor, size: int) -> torch.Tensor:
    """Tokens [T] in the order in which their groups serve them: by descending largest weight, equal ones in order."""
    best = weights.nan_to_num(nan=-torch.inf).amax(1).argsort(descending=True, stable=True)
    return best[(best // size).argsort(stable=True)]


def _static() -> list[StaticKernel]:
    made = []
    outputs = {"indices_ptr": "*i32"}
    for dtype, experts, groups, k, mode in (("*bf16", 8, 1, 2, 0), ("*fp32", 256, 8, 8, 1), ("*fp32", 1024, 1, 64, 2),
                                            ("*fp16", 645, 129, 8, 0)):  # fmt: skip
        tile = route_tile(experts, groups, k)
        constants = {"MODE": mode, "RENORMALIZE": mode != 0, "EPS": mode == 1, "BIAS": groups > 1, "ZERO": False,
                     "stride_e": 1, **tile}  # fmt: skip
        scalars = {"eps": "fp32", "scale": "fp32"}
        made.append(StaticKernel(route_kernel, {**outputs, "logits_ptr": dtype}, scalars, constants, ROUTE_WARPS))
    for experts, by_score in ((8, False), (256, True), (1024, True)):
        pointers = {**outputs, "order_ptr": "*i64" if by_score else "*i32"}
        constants = {"BY_SCORE": by_score, **capacity_tile(experts)}
        made.append(StaticKernel(capacity_kernel, pointers, constants=constants))
    return made


STATIC = _static()
