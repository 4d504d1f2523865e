"""gated_linear_attention on the GPU, one launch: a program holds the state of one head and some value channels.

It walks over chunks of 16 tokens, forward, then backward. Inside a chunk the decay from token s to token t is the
running product of the gates between them, never a quotient of cumulative products: gates of zero and chunks of closing
gates lose nothing. What is left are three small products a chunk: q with the state, scores with values, keys with
values. Keys beyond BLOCK_K are further passes: the result is a sum over key channels.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

CHUNK = tl.constexpr(16)
MOST_KEYS, MOST_VALUES = 64, 32  # of the state's tile


@triton.jit
def score(queries, keys, gates):
    """scores[t, s] = sum over c of q[t, c] k[s, c] and the gates of s + 1 .. t; zero above the diagonal."""
    o_t = tl.arange(0, CHUNK)[:, None, None]
    o_s = tl.arange(0, CHUNK)[None, :, None]
    decay = tl.cumprod(tl.where(o_t > o_s, gates[:, None, :], 1.0), 0)  # a thread holds all t of its (s, c)
    return tl.sum(tl.where(o_t >= o_s, decay * queries[:, None, :] * keys[None, :, :], 0.0), 2)


@triton.jit
def weigh_values(scores, values, PRECISION: tl.constexpr):
    """scores times values [16, BLOCK_V]; what is not finite reaches the tokens from its own on, and no earlier one."""
    rows = tl.arange(0, CHUNK)
    finite = tl.abs(values) < float("inf")
    out = tl.dot(scores, tl.where(finite, values, 0.0), input_precision=PRECISION)
    if tl.min(finite.to(tl.int32)) == 0:
        for s in range(CHUNK):
            this = rows == s
            value = tl.sum(tl.where(this[:, None] & ~finite, values, 0.0), 0)
            weight = tl.sum(tl.where(this[None, :], scores, 0.0), 1)
            reached = (rows >= s)[:, None] & ~(tl.abs(value) < float("inf"))[None, :]
            out += tl.where(reached, weight[:, None] * value[None, :], 0.0)
    return out


@triton.jit
def scan(
    p_q, p_k, p_v, p_gates, p_initial, p_partial, p_out, p_state, tokens, keys, values, scale, o_c, o_v, first, last,
    q_n, q_c, k_n, k_c, v_n, v_c, g_n, g_c, out_n,
    REVERSE: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """One direction for one block of keys: adds to the partial results unless `first`, writes the result if `last`."""
    m_v = o_v < values
    o_state = o_c.to(tl.int64)[:, None] * values + o_v[None, :]
    m_state = (o_c < keys)[:, None] & m_v[None, :]
    state = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if INITIAL:
        state = tl.load(p_initial + o_state, mask=m_state, other=0.0)
    m_c = o_c < keys
    rows = tl.arange(0, CHUNK)
    o_row = -rows + (CHUNK - 1) if REVERSE else rows
    o_c = o_c.to(tl.int64)
    o_v = o_v.to(tl.int64)
    chunks = tl.cdiv(tokens, CHUNK)
    for i in range(chunks):
        o_n = (o_row + (chunks - 1 - i if REVERSE else i) * CHUNK).to(tl.int64)
        o_next = o_n - 1 if REVERSE else o_n + 1
        m_n = (o_n < tokens)[:, None]
        m_k, m_out = m_n & m_c[None, :], m_n & m_v[None, :]
        m_next = ((o_next < tokens) & (rows < CHUNK - 1))[:, None] & m_c[None, :]
        q = tl.load(p_q + o_n[:, None] * q_n + o_c[None, :] * q_c, mask=m_k, other=0.0).to(tl.float32) * scale
        k = tl.load(p_k + o_n[:, None] * k_n + o_c[None, :] * k_c, mask=m_k, other=0.0).to(tl.float32)
        v = tl.load(p_v + o_n[:, None] * v_n + o_v[None, :] * v_c, mask=m_out, other=0.0).to(tl.float32)
        p_gate = p_gates + o_c[None, :] * g_c
        gates = tl.exp(tl.load(p_gate + o_n[:, None] * g_n, mask=m_k, other=0.0).to(tl.float32))
        later = tl.exp(tl.load(p_gate + o_next[:, None] * g_n, mask=m_next, other=0.0).to(tl.float32))
        from_start = tl.cumprod(gates, 0)
        to_end = tl.cumprod(later, 0, reverse=True)
        whole = tl.sum(tl.where((rows == CHUNK - 1)[:, None], from_start, 0.0), 0)
        out = tl.dot(q * from_start, state, input_precision=PRECISION)
        out += weigh_values(score(q, k, gates), v, PRECISION)
        state = whole[:, None] * state + tl.dot(tl.trans(k * to_end), v, input_precision=PRECISION)
        o_out = o_n[:, None] * out_n + o_v[None, :]
        out += tl.load(p_partial + o_out, mask=m_out & ~first, other=0.0).to(tl.float32)
        tl.store(p_partial + o_out, out, mask=m_out & ~last)
        tl.store(p_out + o_out, out, mask=m_out & last)
    if FINAL:
        tl.store(p_state + o_state, state, mask=m_state)
    tl.debug_barrier()  # the partial results of this pass are read by the next


@triton.jit(do_not_specialize=["tokens", "heads", "keys", "values"])
def gated_linear_attention_kernel(
    q_ptr, k_ptr, v_ptr, gates_ptr, backward_ptr, initial_ptr, partial_ptr, out_ptr, state_ptr,
    tokens, heads, keys, values, scale,
    stride_qb, stride_qn, stride_qh, stride_qc, stride_kb, stride_kn, stride_kh, stride_kc,
    stride_vb, stride_vn, stride_vh, stride_vc, stride_gb, stride_gn, stride_gh, stride_gc,
    stride_bb, stride_bn, stride_bh, stride_bc,
    BOTH: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """BLOCK_V value channels of one head of one sample, all tokens, one direction or both."""
    unit = tl.program_id(0).to(tl.int64)
    b, h = unit // tl.cast(heads, tl.int64), unit % tl.cast(heads, tl.int64)
    o_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    p_q = q_ptr + b * stride_qb + h * stride_qh
    p_k = k_ptr + b * stride_kb + h * stride_kh
    p_v = v_ptr + b * stride_vb + h * stride_vh
    p_gates = gates_ptr + b * stride_gb + h * stride_gh
    p_backward = backward_ptr + b * stride_bb + h * stride_bh
    out_n = tl.cast(heads, tl.int64) * values
    o_unit = b * tokens * out_n + h * values
    p_out = out_ptr + o_unit
    p_partial = p_out
    if PARTIAL:  # one tensor is not passed twice to be written: a plan could not tell which is the result
        p_partial = partial_ptr + o_unit
    p_initial, p_state = initial_ptr + unit * keys * values, state_ptr + unit * keys * values
    blocks = tl.cdiv(keys, BLOCK_K)
    for block in range(blocks):
        o_c = block * BLOCK_K + tl.arange(0, BLOCK_K)
        passed = tl.full((1, 1), 0, tl.int32) + block
        never, last = passed < 0, passed == blocks - 1
        scan(
            p_q, p_k, p_v, p_gates, p_initial, p_partial, p_out, p_state, tokens, keys, values, scale, o_c, o_v,
            passed == 0, never if BOTH else last, stride_qn, stride_qc, stride_kn, stride_kc,
            stride_vn, stride_vc, stride_gn, stride_gc, out_n, False, INITIAL, FINAL, PRECISION, BLOCK_K, BLOCK_V,
        )  # fmt: skip
        if BOTH:
            scan(
                p_q, p_k, p_v, p_backward, p_initial, p_partial, p_out, p_state, tokens, keys, values, scale, o_c, o_v,
                never, last, stride_qn, stride_qc, stride_kn, stride_kc,
                stride_vn, stride_vc, stride_bn, stride_bc, out_n, True, False, False, PRECISION, BLOCK_K, BLOCK_V,
            )  # fmt: skip


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gates: torch.Tensor, backward_log_gates: torch.Tensor,
    initial_state: torch.Tensor, scale: float, return_state: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Result and last state; the contract is that of `attend_with_gates` and `stream_with_gates`."""
    batch, tokens, heads, keys = q.shape
    values = v.shape[3]
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    rows = batch if return_state else 0
    state = torch.empty(rows, heads, keys, values, dtype=torch.float32, device=v.device)
    if batch * heads * values == 0:
        return out, state
    both = backward_log_gates.numel() > 0
    block_k = min(MOST_KEYS, max(16, triton.next_power_of_2(keys)))
    block_v = min(MOST_VALUES, max(16, triton.next_power_of_2(values)))
    exact = v.dtype == torch.float32
    one_pass = not both and keys <= block_k
    partial = out if exact or one_pass else torch.empty(v.shape, dtype=torch.float32, device=v.device)
    backward = backward_log_gates if both else log_gates
    with torch.cuda.device_of(v):
        gated_linear_attention_kernel[(batch * heads, triton.cdiv(values, block_v))](
            q, k, v, log_gates, backward, initial_state.contiguous(), partial, out, state,
            tokens, heads, keys, values, scale / 2 if both else scale,
            *q.stride(), *k.stride(), *v.stride(), *log_gates.stride(), *backward.stride(),
            BOTH=both, INITIAL=initial_state.numel() > 0, FINAL=return_state, PARTIAL=partial is not out,
            PRECISION="ieee" if exact else "tf32",
            BLOCK_K=block_k, BLOCK_V=block_v, num_warps=8,
        )  # fmt: skip
    return out, state


def _static() -> list[StaticKernel]:
    made = []
    for dtype, keys, both in (("*bf16", 32, True), ("*fp32", 64, False)):
        half = dtype != "*fp32"
        constants = {
            **{f"stride_{tensor}c": 1 for tensor in "qkvgb"}, "BOTH": both, "INITIAL": not both, "FINAL": not both,
            "PARTIAL": half and both, "PRECISION": "tf32" if half else "ieee", "BLOCK_K": keys, "BLOCK_V": MOST_VALUES,
        }  # fmt: skip
        pointers = {f"{name}_ptr": dtype for name in ("q", "k", "v", "gates", "backward", "out")}
        kernel = gated_linear_attention_kernel
        made.append(StaticKernel(kernel, pointers, scalars={"scale": "fp32"}, constants=constants, num_warps=8))
    return made


STATIC = _static()
