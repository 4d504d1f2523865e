"""halo_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.halo_attention.cases import cases
from planmill.kernels.attention.halo_attention.reference import halo_attention_reference
from planmill.kernels.common.checks import check_alike, check_choice, check_device, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

PAD_MODES = ("zero", "mask")
LAYOUT = "[B, heads, d, H, W]"

SPEC = OpSpec(
    schema="halo_attention(Tensor q, Tensor k, Tensor v, Tensor rel_h, Tensor rel_w, int block, int halo, int stride, "
    "float scale, bool masked, bool scale_positions) -> Tensor",
    outputs=lambda q, k, v, *_: [((q.shape[0], q.shape[1], v.shape[2], q.shape[3], q.shape[4]), q.dtype)],
    reference=halo_attention_reference,
    cases=cases,
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (1e-3, 1e-3)},
    cpu="C++",
    cuda="_triton:launch",
    cuda_limit="heads of more than 256 channels",
)
_op, _call = register(SPEC)


def attend_to_halo(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rel_h: torch.Tensor,
    rel_w: torch.Tensor,
    *,
    block: int,
    halo: int,
    stride: int = 1,
    scale: float | None = None,
    pad_mode: str = "zero",
    scale_pos_embed: bool = False,
) -> torch.Tensor:
    """Blocked local attention: the queries of a block attend to that block and a halo around it.

    With win = block + 2 halo, query i = (iy, ix) in [0, block / stride)^2 of its block and key j = (jy, jx) in
    [0, win)^2 of the window that begins `halo` above and left of the block:

        logit[i, j] = scale <q_i, k_j> + <q_i, rel_h[jy - iy + win - 1]> + <q_i, rel_w[jx - ix + win - 1]>
        y_i = sum over j of softmax_j(logit[i, j]) v_j

    Products, softmax and sums are float32 at least, whatever the dtype; neither windows nor logits are stored.

    Args:
        q: [B, heads, d, H / stride, W / stride], float16, bfloat16 or float32, any strides: the output of a 1 x 1
            convolution fits as it is, `conv(x).unflatten(1, (heads, d))`, planar or channels-last.
        k: [B, heads, d, H, W], v: [B, heads, dv, H, W], dtype of q, any strides; H and W are multiples of block.
        rel_h, rel_w: [2 win - 1, d] float16, bfloat16 or float32, shared by the heads. Offsets count from the corner
            of the window, not of the block, so the lowest win - block / stride rows are never read.
        block: pixels of k along one side of a block; a multiple of stride.
        halo: pixels around a block.
        stride: pixels of k for one of q, along each axis.
        scale: of <q_i, k_j>; None: d^-0.5.
        pad_mode: keys outside the image are "zero" vectors that keep their positional logit, take softmax mass and
            give nothing, as in timm; or they do not count ("mask").
        scale_pos_embed: multiply the positional terms by `scale` too.

    Returns:
        y [B, heads, dv, H / stride, W / stride], dtype of q. No selection is made, so NaN and infinity follow the
        arithmetic: a NaN is seen in the queries whose window holds it, and in no other.

    Raises:
        ValueError: shapes that do not fit, H or W not a multiple of block, another device, an unknown pad_mode.
        TypeError: another dtype.

    Source: Vaswani et al., "Scaling local self-attention for parameter efficient visual backbones" (CVPR 2021), section
    2.2. The authors published no code; the index formula, the zero padding and the stride are those of timm's HaloAttn.
    """
    op = "halo_attention"
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_rank(op, name, x, 5, LAYOUT)
        check_float(op, name, x)
        check_alike(op, name, x, "q", q)
    check_choice(op, "pad_mode", pad_mode, PAD_MODES)
    _check_geometry(op, q, k, v, block, halo, stride)
    positions = [2 * (block + 2 * halo) - 1, q.shape[2]]
    for name, x in (("rel_h", rel_h), ("rel_w", rel_w)):
        check_float(op, name, x)
        check_device(op, name, x, "q", q)
        if list(x.shape) != positions:
            raise ValueError(f"{op}: {name} must be {positions}, [2 win - 1, d], got {list(x.shape)}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    run = _op if is_compiling() else _call
    return run(q, k, v, rel_h, rel_w, block, halo, stride, scale, pad_mode == "mask", scale_pos_embed)


def _check_geometry(
    op: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: int, halo: int, stride: int
) -> None:
    """Raise unless blocks tile the image and q, k and v belong together."""
    if block < 1 or halo < 0 or stride < 1 or block % stride:
        raise ValueError(
            f"{op}: block must be a positive multiple of stride and halo at least 0, got block {block}, halo {halo}, "
            f"stride {stride}"
        )
    height, width = k.shape[3:]
    if height % block or width % block:
        raise ValueError(f"{op}: H and W of k must be multiples of block {block}, got H {height}, W {width}")
    if q.shape[2] < 1:
        raise ValueError(f"{op}: q must have at least one channel a head, got {list(q.shape)}")
    wanted = [*k.shape[:3], height // stride, width // stride]
    if list(q.shape) != wanted:
        raise ValueError(f"{op}: q must be {wanted} for k {list(k.shape)} at stride {stride}, got {list(q.shape)}")
    if list(v.shape) != [*k.shape[:2], v.shape[2], height, width]:
        raise ValueError(f"{op}: v must be {[*k.shape[:2], 'dv', height, width]} like k, got {list(v.shape)}")
