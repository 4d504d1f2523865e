"""selective_scan on the GPU: one program per block of channels of a sample, states in registers, one step at a time.

Programs of a sample read the same B and C, from the caches after the first. Softplus, skip and gate cost no pass.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel

BLOCK_D = 32  # channels of a program
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x):
    e = tl.exp(tl.where(x > 20.0, 20.0, x))
    small = e - 0.5 * e * e  # log(1 + e), where 1 + e would round e away
    return tl.where(x > 20.0, x, tl.where(e < 1e-3, small, tl.log(1.0 + e)))


@triton.jit(do_not_specialize=["length", "channels", "states", "per_group", "blocks"])
def scan_kernel(
    u_ptr, delta_ptr, a_ptr, b_ptr, c_ptr, d_ptr, z_ptr, bias_ptr, y_ptr, last_ptr, length, channels, states, per_group,
    blocks, groups, stride_ub, stride_ud, stride_ul, stride_db, stride_dd, stride_dl, stride_zb, stride_zd, stride_zl,
    stride_bb, stride_bg, stride_bn, stride_bl, stride_cb, stride_cg, stride_cn, stride_cl,
    SOFTPLUS: tl.constexpr, BIASED: tl.constexpr, SKIP: tl.constexpr, GATED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):  # fmt: skip
    """y and the last state of BLOCK_D channels of one group of one sample."""
    task = tl.program_id(0)
    block, image = task % blocks, task // blocks
    g = (image % groups).to(tl.int64)
    b = (image // groups).to(tl.int64)
    o_in = block * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_in < per_group
    o_d = g * per_group + o_in
    o_n = tl.arange(0, BLOCK_S)
    m_n = o_n < states
    m_a = m_d[:, None] & m_n[None, :]
    rate = tl.load(a_ptr + o_d[:, None] * states + o_n[None, :], mask=m_a, other=0.0) * LOG2E
    h = tl.zeros((BLOCK_D, BLOCK_S), tl.float32)
    if BIASED:
        bias = tl.load(bias_ptr + o_d, mask=m_d, other=0.0)
    if SKIP:
        skip = tl.load(d_ptr + o_d, mask=m_d, other=0.0)
    p_u, p_delta = u_ptr + b * stride_ub + o_d * stride_ud, delta_ptr + b * stride_db + o_d * stride_dd
    p_z = z_ptr + b * stride_zb + o_d * stride_zd
    p_b = b_ptr + b * stride_bb + g * stride_bg + o_n.to(tl.int64) * stride_bn
    p_c = c_ptr + b * stride_cb + g * stride_cg + o_n.to(tl.int64) * stride_cn
    p_y = y_ptr + (b * channels + o_d) * length
    for _ in range(0, length):
        u = tl.load(p_u, mask=m_d, other=0.0).to(tl.float32)
        dl = tl.load(p_delta, mask=m_d, other=0.0).to(tl.float32)
        if BIASED:
            dl += bias
        if SOFTPLUS:
            dl = softplus(dl)
        into = tl.load(p_b, mask=m_n, other=0.0).to(tl.float32)
        out = tl.load(p_c, mask=m_n, other=0.0).to(tl.float32)
        h = tl.exp2(dl[:, None] * rate) * h + (dl * u)[:, None] * into[None, :]
        y = tl.sum(h * out[None, :], 1)
        if SKIP:
            y += skip * u
        if GATED:
            z = tl.load(p_z, mask=m_d, other=0.0).to(tl.float32)
            y *= z / (1.0 + tl.exp(-z))
        tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_d)
        p_u, p_delta, p_z, p_y = p_u + stride_ul, p_delta + stride_dl, p_z + stride_zl, p_y + 1
        p_b, p_c = p_b + stride_bl, p_c + stride_cl
    tl.store(last_ptr + (b * channels + o_d)[:, None] * states + o_n[None, :], h, mask=m_a)


def launch(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor, z: torch.Tensor, delta_bias: torch.Tensor, delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """y [B, Di, L] and h_L [B, Di, Ns]; the contract is that of `scan_selectively`."""
    batch, channels, length = u.shape
    groups, states = B.shape[1], A.shape[1]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    last = torch.empty(batch, channels, states, dtype=torch.float32, device=u.device)
    if last.numel() == 0 and y.numel() == 0:
        return y, last
    blocks = triton.cdiv(channels // groups, BLOCK_D)
    gated = z.numel() > 0
    z = z if gated else u
    with torch.cuda.device_of(u):
        scan_kernel[(batch * groups * blocks,)](
            u, delta, A.float().contiguous(), B, C, D.float().contiguous(), z, delta_bias.float().contiguous(), y, last,
            length, channels, states, channels // groups, blocks, groups, *u.stride(), *delta.stride(), *z.stride(),
            *B.stride(), *C.stride(), SOFTPLUS=delta_softplus, BIASED=delta_bias.numel() > 0, SKIP=D.numel() > 0,
            GATED=gated, BLOCK_D=BLOCK_D, BLOCK_S=triton.next_power_of_2(max(1, states)), num_warps=1,
        )  # fmt: skip
    return y, last


def _static() -> list[StaticKernel]:
    """Mamba's block: delta, B, C and z are transposes of rows of tokens."""
    constants = {
        "stride_ul": 1, "stride_dd": 1, "stride_zd": 1, "stride_bn": 1, "stride_cn": 1, "SOFTPLUS": True,
        "BIASED": True, "SKIP": True, "GATED": True, "BLOCK_D": BLOCK_D, "BLOCK_S": 16,
    }  # fmt: skip
    names = ("u", "delta", "b", "c", "z", "y")
    return [
        StaticKernel(scan_kernel, {f"{name}_ptr": element for name in names}, constants=constants, num_warps=1)
        for element in ("*fp32", "*bf16")
    ]


STATIC = _static()
