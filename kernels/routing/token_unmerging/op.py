"""token_unmerging: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.token_matching.plan import MergePlan, check_rows
from planmill.kernels.routing.token_unmerging.cases import cases
from planmill.kernels.routing.token_unmerging.reference import token_unmerging_reference


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """A merged row collects from all of its tokens; sums in float32."""
    y, row_of_token, residual, scale = args
    batch, rows, channels = y.shape
    gradient = grads[0].float()
    first = torch.arange(batch, device=y.device)[:, None] * rows
    row = (row_of_token + first).flatten()
    scaled = gradient * scale if scale.numel() else gradient
    total = torch.zeros(batch * rows, channels, dtype=torch.float32, device=y.device)
    total = total.index_add(0, row, scaled.reshape(-1, channels))
    for_scale = torch.zeros_like(scale)
    if scale.numel():
        picked = y.reshape(-1, channels)[row].view(gradient.shape).float()
        for_scale = (gradient * picked).sum((0, 1)).to(scale.dtype)
    for_residual = grads[0].clone() if residual.numel() else torch.zeros_like(residual)
    return total.view(y.shape).to(y.dtype), None, for_residual, for_scale


SPEC = OpSpec(
    schema="token_unmerging(Tensor y, Tensor row_of_token, Tensor residual, Tensor scale) -> Tensor",
    outputs=lambda y, row_of_token, residual, scale: [((y.shape[0], row_of_token.shape[1], y.shape[2]), y.dtype)],
    reference=token_unmerging_reference,
    cases=cases,
    backward=backward,
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 8e-3), torch.float16: (2e-3, 2e-3)},
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def unmerge_tokens(
    y: torch.Tensor, plan: MergePlan, residual: torch.Tensor | None = None, scale: torch.Tensor | None = None
) -> torch.Tensor:
    """Give every token the row it was merged into: `x[t] = residual[t] + scale * y[row_of_token[t]]`.

    Protected tokens get the row of their own, not the one they were merged into as destinations. The residual stream
    and the LayerScale of the block are added in the same pass: the unmerged tensor alone is never stored.
    Differentiable with respect to y, residual and scale; on a GPU the gradient of y adds in no fixed order.

    Args:
        y: [B, N_m, C], float32, bfloat16 or float16, any strides.
        plan: of `match_tokens`, on the device of y.
        residual: [B, N, C], dtype of y; None: nothing is added.
        scale: [C], any floating dtype; None: one.

    Returns:
        [B, N, C], dtype of y; float32 arithmetic, rounded once.

    Raises:
        ValueError: wrong rank, other sizes or another device than the plan's.
        TypeError: another dtype.

    Source: FastVGGT (Shen et al., 2025), unmerge after attention; its residual and LayerScale stand outside.
    """
    op = "token_unmerging"
    check_rows(op, "y", y, plan, plan.rows, "[B, N_m, C]")
    if residual is None:
        residual = torch.empty(0, dtype=y.dtype, device=y.device)
    else:
        check_rows(op, "residual", residual, plan, plan.tokens, "[B, N, C]")
        check_alike(op, "residual", residual, "y", y)
        if residual.shape[2] != y.shape[2]:
            raise ValueError(f"{op}: residual must have the {y.shape[2]} channels of y, got {list(residual.shape)}")
    if scale is None:
        scale = torch.empty(0, dtype=torch.float32, device=y.device)
    else:
        if not scale.is_floating_point():
            raise TypeError(f"{op}: scale must be floating, got {scale.dtype}")
        if scale.shape != y.shape[2:] or scale.device != y.device:
            raise ValueError(
                f"{op}: scale must be [{y.shape[2]}] on {y.device} like y, got {list(scale.shape)} on {scale.device}"
            )
        scale = scale.float()
    return (_op if is_compiling() else _call)(y, plan.row_of_token, residual, scale)
