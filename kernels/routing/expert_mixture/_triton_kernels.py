"""The products over sorted rows, and the sum over a token's experts. Launched by `_triton`.

A program of a product owns one block of rows, all of one expert, and BLOCK_N columns. The first `count` blocks exist;
programs are numbered so that only the last ones, which leave at once, have none. Within GROUP blocks the block
changes fastest: programs that run together read the same weights, once from memory.
"""

import triton
import triton.language as tl

SQRT_HALF = tl.constexpr(0.7071067811865476)
TANH_SCALE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
TANH_CUBIC = tl.constexpr(0.044715)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """act(x); NaN stays NaN. The tanh of gelu_tanh is written as 0.5 (1 + tanh(z)) = sigmoid(2 z)."""
    if ACTIVATION == "silu":
        y = x / (1.0 + tl.exp(-x))
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))
    elif ACTIVATION == "gelu_tanh":
        z = (x + x * x * x * TANH_CUBIC) * TANH_SCALE
        y = x / (1.0 + tl.exp(-z))
    else:
        y = tl.where(x < 0.0, 0.0, x)
    return y


@triton.jit
def place(program, count, tiles, GROUP: tl.constexpr):
    """(block, tile of columns) of a program; the block is `count` or more where there is nothing to do."""
    group = program // (GROUP * tiles)
    first = group * GROUP
    height = tl.minimum(count - first, GROUP)
    inside = program - first * tiles
    tile = inside // tl.maximum(height, 1)
    return tl.where(program < count * tiles, first + inside - tile * height, count), tile


@triton.jit
def multiply(rows, weights, acc, SWAP: tl.constexpr):
    """acc + rows weights^T; transposed, weights rows^T, where few rows would leave a product's 64 lines empty."""
    if SWAP:
        acc = tl.dot(weights, tl.trans(rows), acc, input_precision="ieee")
    else:
        acc = tl.dot(rows, tl.trans(weights), acc, input_precision="ieee")
    return acc


@triton.jit
def finish(acc, p_bias, m_n, factor, BIAS: tl.constexpr, SWAP: tl.constexpr):
    """[rows, columns] factor acc + bias; `factor` is of a row, or 1."""
    if SWAP:
        acc = tl.trans(acc)
    acc = acc * factor
    if BIAS:
        acc += tl.load(p_bias, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit(do_not_specialize=["rows", "fanout", "tiles"])
def up_kernel(
    x_ptr, weight_ptr, up_ptr, bias_ptr, row_ptr, expert_ptr, count_ptr, out_ptr, rows, fanout, width, hidden, tiles,
    stride_x_t, stride_x_d, stride_up_e, stride_up_f, stride_up_d, stride_bias_e, stride_bias_f,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, BIAS: tl.constexpr, SCALE: tl.constexpr, SWAP: tl.constexpr,
    EVEN_K: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[place, f] = act(gate) * up, or act(up), of the row at each place of a block; SCALE: token times weight."""
    count = tl.load(count_ptr)
    block, tile = place(tl.program_id(0), count, tiles, GROUP)
    if block >= count:
        return
    o_place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(row_ptr + o_place)
    m_row = row < rows
    token = tl.where(m_row, row // fanout, 0)
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < hidden
    expert = tl.load(expert_ptr + block).to(tl.int64)
    p_x = x_ptr + token.to(tl.int64)[:, None] * stride_x_t + o_k.to(tl.int64)[None, :] * stride_x_d
    p_up = up_ptr + expert * stride_up_e + o_n.to(tl.int64)[:, None] * stride_up_f
    p_up += o_k.to(tl.int64)[None, :] * stride_up_d
    step = tl.full((), BLOCK_K, tl.int64)
    step_x, step_up = step * stride_x_d, step * stride_up_d
    wide = tl.full((), 1, tl.int64) * hidden
    half = wide * stride_up_f  # from a gate to what it multiplies
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SWAP:
        acc = tl.trans(acc)
    acc_2 = acc
    for start in range(0, width, BLOCK_K):
        if EVEN_K:
            m_x, m_up = m_row[:, None], m_n[:, None]
        else:
            m_k = (o_k < width - start)[None, :]
            m_x, m_up = m_row[:, None] & m_k, m_n[:, None] & m_k
        x = tl.load(p_x, mask=m_x, other=0.0)
        acc = multiply(x, tl.load(p_up, mask=m_up, other=0.0), acc, SWAP)
        if GATED:
            acc_2 = multiply(x, tl.load(p_up + half, mask=m_up, other=0.0), acc_2, SWAP)
        p_x += step_x
        p_up += step_up
    factor = 1.0
    if SCALE:
        factor = tl.load(weight_ptr + row, mask=m_row, other=0.0)[:, None]
    p_bias = bias_ptr + expert * stride_bias_e + o_n.to(tl.int64) * stride_bias_f
    value = activate(finish(acc, p_bias, m_n, factor, BIAS, SWAP), ACTIVATION)
    if GATED:
        p_bias += wide * stride_bias_f
        value *= finish(acc_2, p_bias, m_n, factor, BIAS, SWAP)
    p_out = out_ptr + o_place[:, None] * hidden + o_n[None, :]
    tl.store(p_out, value.to(out_ptr.dtype.element_ty), mask=m_row[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["rows", "tiles"])
def down_kernel(
    hidden_ptr, down_ptr, bias_ptr, row_ptr, expert_ptr, count_ptr, out_ptr, rows, hidden, columns, tiles, run,
    stride_down_e, stride_down_o, stride_down_f, stride_bias_e, stride_bias_o,
    BIAS: tl.constexpr, SWAP: tl.constexpr, EVEN_K: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, row, o] = down h (+ bias in split 0) over `run` hidden channels; rows as before sorting."""
    count = tl.load(count_ptr)
    block, tile = place(tl.program_id(0), count, tiles, GROUP)
    if block >= count:
        return
    split = tl.program_id(1)
    o_place = block.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(row_ptr + o_place)
    m_row = row < rows
    o_n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < columns
    expert = tl.load(expert_ptr + block).to(tl.int64)
    begin = split * run
    end = tl.minimum(begin + run, hidden)
    p_hidden = hidden_ptr + o_place[:, None] * hidden + begin + o_k[None, :]
    p_down = down_ptr + expert * stride_down_e + o_n.to(tl.int64)[:, None] * stride_down_o
    p_down += (begin + o_k).to(tl.int64)[None, :] * stride_down_f
    step_down = tl.full((), BLOCK_K, tl.int64) * stride_down_f
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if SWAP:
        acc = tl.trans(acc)
    for start in range(begin, end, BLOCK_K):
        if EVEN_K:
            m_hidden, m_down = m_row[:, None], m_n[:, None]
        else:
            m_k = (o_k < end - start)[None, :]
            m_hidden, m_down = m_row[:, None] & m_k, m_n[:, None] & m_k
        h = tl.load(p_hidden, mask=m_hidden, other=0.0)
        acc = multiply(h, tl.load(p_down, mask=m_down, other=0.0), acc, SWAP)
        p_hidden += BLOCK_K
        p_down += step_down
    p_bias = bias_ptr + expert * stride_bias_e + o_n.to(tl.int64) * stride_bias_o
    value = finish(acc, p_bias, o_n < tl.where(split == 0, columns, 0), 1.0, BIAS, SWAP)
    p_out = out_ptr + (split.to(tl.int64) * rows + row)[:, None] * columns + o_n[None, :]
    tl.store(p_out, value, mask=m_row[:, None] & m_n[None, :])


@triton.jit(do_not_specialize=["fanout", "experts", "splits", "rows"])
def combine_kernel(
    part_ptr, index_ptr, weight_ptr, out_ptr, fanout, experts, columns, splits, rows,
    SCALE: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over j, in order, of (weights[t, j] where SCALE) * the sum over splits of part[split, t k + j]."""
    token = tl.program_id(0)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < columns
    total = tl.zeros((BLOCK_C,), tl.float32)
    for j in range(fanout):
        row = token.to(tl.int64) * fanout + j
        expert = tl.load(index_ptr + row)
        if (expert >= 0) & (expert < experts):
            term = tl.zeros((BLOCK_C,), tl.float32)
            p_part = part_ptr + row * columns + o_c
            for _ in range(splits):
                term += tl.load(p_part, mask=m_c, other=0.0)
                p_part += tl.cast(rows, tl.int64) * columns
            if SCALE:
                term *= tl.load(weight_ptr + row)
            total += term
    tl.store(out_ptr + token.to(tl.int64) * columns + o_c, total.to(out_ptr.dtype.element_ty), mask=m_c)
