"""halo_attention on the GPU: one program per block of a head (or tile of its queries), an online softmax over its keys.

The two positional terms of a query depend on the row and on the column of the key, each by its offset to the query's:
products of the queries with both tables give them for every offset, and a gather within the tile picks each key's own.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.attention.halo_attention.reference import halo_attention_reference
from planmill.kernels.common.triton_checks import StaticKernel

WIDEST = 256  # channels of a head: float32 tiles of 512 do not fit shared memory
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_planes(p_x, o_c, o_y, o_x, mask, stride_c, stride_y, stride_x):
    """[len(o_c), len(o_y)] or transposed, as the offsets are shaped."""
    o = o_c.to(tl.int64) * stride_c + o_y.to(tl.int64) * stride_y + o_x.to(tl.int64) * stride_x
    return tl.load(p_x + o, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "columns", "heads", "d", "dv", "scale"])
def halo_kernel(
    q_ptr, k_ptr, v_ptr, rel_h_ptr, rel_w_ptr, y_ptr, rows, columns, heads, d, dv, scale,
    stride_qb, stride_qh, stride_qc, stride_qy, stride_qx, stride_kb, stride_kh, stride_kc, stride_ky, stride_kx,
    stride_vb, stride_vh, stride_vc, stride_vy, stride_vx,
    BLOCK: tl.constexpr, HALO: tl.constexpr, SIDE: tl.constexpr, MASKED: tl.constexpr, SCALE_POSITIONS: tl.constexpr,
    BLOCK_I: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Queries [BLOCK_I * program 1, ...) of block program 0 of all heads of all images."""
    WIN: tl.constexpr = BLOCK + 2 * HALO
    height, width = rows * BLOCK, columns * BLOCK
    task = tl.program_id(0)
    r, p = task % columns, task // columns % rows
    image = task // (rows * columns)
    b, h = (image // heads).to(tl.int64), (image % heads).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    iy, ix = o_i // SIDE, o_i % SIDE
    m_i = o_i < SIDE * SIDE
    o_d, o_v, o_o = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_V), tl.arange(0, BLOCK_O)
    p_q = q_ptr + b * stride_qb + h * stride_qh
    p_k = k_ptr + b * stride_kb + h * stride_kh
    p_v = v_ptr + b * stride_vb + h * stride_vh
    m_q = m_i[:, None] & (o_d < d)[None, :]
    q = load_planes(
        p_q, o_d[None, :], (p * SIDE + iy)[:, None], (r * SIDE + ix)[:, None], m_q, stride_qc, stride_qy, stride_qx
    )
    # offset o of a key counts from WIN - SIDE, the lowest that a query and a key can have
    o_table = (WIN - SIDE + o_o)[None, :] * d + o_d[:, None]
    m_table = (o_o < WIN + SIDE - 1)[None, :] & (o_d < d)[:, None]
    by_row = tl.dot(q, tl.load(rel_h_ptr + o_table, mask=m_table, other=0.0).to(q.dtype), input_precision="ieee")
    by_column = tl.dot(q, tl.load(rel_w_ptr + o_table, mask=m_table, other=0.0).to(q.dtype), input_precision="ieee")
    position_scale = scale if SCALE_POSITIONS else 1.0
    top = tl.full((BLOCK_I,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_I,), tl.float32)
    y = tl.zeros((BLOCK_I, BLOCK_V), tl.float32)
    for start in range(0, WIN * WIN, BLOCK_J):
        o_j = start + tl.arange(0, BLOCK_J)
        jy, jx = o_j // WIN, o_j % WIN
        at_y, at_x = p * BLOCK - HALO + jy, r * BLOCK - HALO + jx
        m_j = o_j < WIN * WIN
        inside = m_j & (at_y >= 0) & (at_y < height) & (at_x >= 0) & (at_x < width)
        k = load_planes(
            p_k, o_d[:, None], at_y[None, :], at_x[None, :], (o_d < d)[:, None] & inside[None, :],
            stride_kc, stride_ky, stride_kx,
        )  # fmt: skip
        o_row = tl.where(m_i[:, None] & m_j[None, :], jy[None, :] - iy[:, None] + SIDE - 1, 0)
        o_column = tl.where(m_i[:, None] & m_j[None, :], jx[None, :] - ix[:, None] + SIDE - 1, 0)
        position = tl.gather(by_row, o_row, 1) + tl.gather(by_column, o_column, 1)
        x = tl.dot(q, k, input_precision="ieee") * scale + position * position_scale
        x = tl.where((inside if MASKED else m_j)[None, :], x * LOG2E, float("-inf"))
        unknown = tl.max((x != x).to(tl.int32), 1) > 0  # a NaN; a maximum may drop it
        higher = tl.maximum(top, tl.where(unknown, float("nan"), tl.max(x, 1)), propagate_nan=tl.PropagateNan.ALL)
        floor = tl.where(higher == float("-inf"), 0.0, higher)  # nothing counted yet
        share = tl.exp2(x - floor[:, None])
        keep = tl.exp2(top - floor)
        v = load_planes(
            p_v, o_v[None, :], at_y[:, None], at_x[:, None], (o_v < dv)[None, :] & inside[:, None],
            stride_vc, stride_vy, stride_vx,
        )  # fmt: skip
        total = total * keep + tl.sum(share, 1)
        y = y * keep[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        top = higher
    y = y / total[:, None]
    o_y = ((p * SIDE + iy) * (columns * SIDE) + r * SIDE + ix).to(tl.int64)
    p_y = y_ptr + image.to(tl.int64) * dv * (rows * SIDE) * (columns * SIDE)
    plane = (rows * SIDE).to(tl.int64) * (columns * SIDE)
    m_y = m_i[:, None] & (o_v < dv)[None, :]
    tl.store(p_y + o_v.to(tl.int64)[None, :] * plane + o_y[:, None], y.to(y_ptr.dtype.element_ty), mask=m_y)


def tile_sizes(dtype: torch.dtype, d: int, dv: int, block: int, halo: int, side: int) -> dict[str, int]:
    """Queries and keys of a tile, and widths padded to powers of two. float32 multiplies without tensor cores."""
    width = max(d, dv)
    queries, keys = (16, 32) if dtype is torch.float32 else (64, 64 if width <= 32 else 32)

    def padded(n: int) -> int:
        return max(16, triton.next_power_of_2(n))

    return {
        "BLOCK_I": min(queries, padded(side * side)), "BLOCK_J": keys, "BLOCK_D": padded(d), "BLOCK_V": padded(dv),
        "BLOCK_O": padded(block + 2 * halo + side - 1),
    }  # fmt: skip


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rel_h: torch.Tensor, rel_w: torch.Tensor,
    block: int, halo: int, stride: int, scale: float, masked: bool, scale_positions: bool,
) -> torch.Tensor:  # fmt: skip
    """y [B, heads, dv, H / stride, W / stride]; the contract is that of `attend_to_halo`."""
    batch, heads, d, dv, side = q.shape[0], q.shape[1], q.shape[2], v.shape[2], block // stride
    y = torch.empty(batch, heads, dv, q.shape[3], q.shape[4], dtype=q.dtype, device=q.device)
    if y.numel() == 0:
        return y
    rows, columns = k.shape[3] // block, k.shape[4] // block
    if max(d, dv) > WIDEST:
        arguments = (q, k, v, rel_h, rel_w, block, halo, stride, scale, masked, scale_positions)
        return halo_attention_reference(*arguments).contiguous()
    tiles = tile_sizes(q.dtype, d, dv, block, halo, side)
    grid = (batch * heads * rows * columns, triton.cdiv(side * side, tiles["BLOCK_I"]))
    with torch.cuda.device_of(q):
        halo_kernel[grid](
            q, k, v, rel_h.contiguous(), rel_w.contiguous(), y, rows, columns, heads, d, dv, scale,
            *q.stride(), *k.stride(), *v.stride(), BLOCK=block, HALO=halo, SIDE=side, MASKED=masked,
            SCALE_POSITIONS=scale_positions, **tiles, num_warps=4,
        )  # fmt: skip
    return y


def _static() -> list[StaticKernel]:
    """HaloNet's blocks of 8 with halos of 3 and 2, its widths of a head, both strides."""
    made = []
    for element, width, halo, side in (
        (torch.float32, 32, 3, 8), (torch.float32, 64, 3, 8), (torch.bfloat16, 32, 3, 8), (torch.bfloat16, 64, 3, 8),
        (torch.bfloat16, 64, 2, 4),
    ):  # fmt: skip
        half = element is torch.bfloat16
        pointers = {f"{name}_ptr": "*bf16" if half else "*fp32" for name in ("q", "k", "v", "rel_h", "rel_w", "y")}
        constants = {
            "stride_qx": 1, "stride_kx": 1, "stride_vx": 1, "BLOCK": 8, "HALO": halo, "SIDE": side, "MASKED": False,
            "SCALE_POSITIONS": False, **tile_sizes(element, width, width, 8, halo, side),
        }  # fmt: skip
        wide = half and side == 8  # wgmma takes 64 rows
        made.append(StaticKernel(halo_kernel, pointers, {"scale": "fp32"}, constants, tensor_core=wide))
    return made


STATIC = _static()
