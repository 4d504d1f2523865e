"""slot_weights: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.slot_weights.cases import cases
from planmill.kernels.routing.slot_weights.reference import WEIGHTINGS, slot_weights_reference

SPEC = OpSpec(
    schema="slot_weights(Tensor logits, Tensor scale, Tensor mask, str weighting, bool scale_dispatch) "
    "-> (Tensor, Tensor)",
    outputs=lambda logits, scale, mask, weighting, scale_dispatch: [
        (logits.shape, torch.float32),
        (logits.shape, torch.float32),
    ],
    reference=slot_weights_reference,
    cases=cases,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def weigh_slots(
    logits: torch.Tensor,
    *,
    scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    weighting: str = "softmax",
    scale_dispatch: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The two weightings of a soft mixture of experts, from one reading of its logits.

    With L[b, n, s] = scale[b, n] * logits[b, n, s], over the tokens n that the mask keeps:

        dispatch[b, n, s] = exp(L[b, n, s]) / sum over n' of exp(L[b, n', s])      what slot s takes of each token
        combine[b, n, s]  = exp(L[b, n, s]) / sum over s' of exp(L[b, n, s'])      "softmax": what token n takes back
        combine[b, n, s]  = phi(h[b, n, s]) / (sum over s' of phi(h[b, n, s']) + 1e-6)                     "linear"

    where h is L standardised per (b, s) over the tokens (biased variance, eps 1e-5) and phi(h) = elu(h) + 1. Maxima are
    subtracted before exp and everything is float32 at least, whatever the dtype of the logits.

    Args:
        logits: [B, N, S] tokens against slots, float32, bfloat16 or float16, any strides; float32 for trained
            models: logits of some hundred lose whole units in 16 bits.
        scale: [B, N] float32, multiplied into the logits of each token: the inverse norms, where tokens are normalised.
        mask: [B, N] bool, False: the token is padding. Its dispatch and combine weights are 0.
        weighting: "softmax" (Soft MoE) or "linear" (La-SoftMoE) combine weights.
        scale_dispatch: multiply `scale` into the dispatch weights too, so that they take normalised tokens out
            of those that were not normalised.

    Returns:
        dispatch, combine: [B, N, S] float32. A NaN among the logits counts as -inf, weight 0; a row (column) of
        combine (dispatch) is NaN only where all its logits are NaN, padding not counted, and zero where none is left.
        A logit above 1e38 counts as 1e38. "linear": moments are of the logits that count, which may not be below -1e38.

    Raises:
        ValueError: wrong rank or shape, an unknown weighting, another device, `scale_dispatch` without `scale`.
        TypeError: another dtype.

    Source: Puigcerver et al., "From sparse to soft mixtures of experts" (ICLR 2024), section 2; "linear": La-SoftMoE,
    as told second-hand: instance normalisation of the logits, then a linear-attention feature map in place of the row
    softmax. phi, both eps and the normaliser are our choice: no code is published.
    """
    op = "slot_weights"
    check_rank(op, "logits", logits, 3, "[B, N, S]")
    check_float(op, "logits", logits)
    check_choice(op, "weighting", weighting, WEIGHTINGS)
    for name, tensor, dtype in (("scale", scale, torch.float32), ("mask", mask, torch.bool)):
        if tensor is None:
            continue
        if tensor.shape != logits.shape[:2]:
            needed = list(logits.shape[:2])
            raise ValueError(f"{op}: {name} must be {needed}, [B, N] of logits, got {list(tensor.shape)}")
        if tensor.dtype is not dtype:
            raise TypeError(f"{op}: {name} must be {dtype}, got {tensor.dtype}")
        if tensor.device != logits.device:
            raise ValueError(f"{op}: {name} must be on {logits.device} like logits, got {tensor.device}")
    if scale_dispatch and scale is None:
        raise ValueError(f"{op}: scale_dispatch needs scale, got None")
    scale = logits.new_empty(0, dtype=torch.float32) if scale is None else scale
    mask = logits.new_empty(0, dtype=torch.bool) if mask is None else mask
    return (_op if is_compiling() else _call)(logits, scale, mask, weighting, scale_dispatch)
