"""token_merging: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.token_matching.plan import MergePlan, check_rows
from planmill.kernels.routing.token_merging.cases import cases
from planmill.kernels.routing.token_merging.reference import token_merging_reference

REDUCTIONS = ("mean", "sum")


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the tokens: each takes its share of the rows that list it."""
    x, offsets, members, mean = args
    gradient = grads[0]
    batch, tokens, channels = x.shape
    if offsets.shape[1] == 1:
        return torch.zeros_like(x), None, None, None
    ends = offsets[:, 1:].contiguous()
    position = torch.arange(members.shape[1], dtype=torch.int32, device=x.device).expand(batch, -1).contiguous()
    row = torch.searchsorted(ends, position, right=True)
    used = row < ends.shape[1]
    row = row.clamp_max(ends.shape[1] - 1)
    if mean:
        gradient = gradient / (ends - offsets[:, :-1]).clamp_min(1)[..., None]
    share = gradient.float().gather(1, row[..., None].expand(-1, -1, channels)) * used[..., None]
    first = torch.arange(batch, device=x.device)[:, None] * tokens
    total = torch.zeros(batch * tokens, channels, dtype=torch.float32, device=x.device)
    total = total.index_add(0, (members + first).flatten(), share.flatten(0, 1))
    return total.view(x.shape).to(x.dtype), None, None, None


SPEC = OpSpec(
    schema="token_merging(Tensor x, Tensor offsets, Tensor members, bool mean) -> Tensor",
    outputs=lambda x, offsets, members, mean: [((x.shape[0], offsets.shape[1] - 1, x.shape[2]), x.dtype)],
    reference=token_merging_reference,
    portable="portable:token_merging_portable",
    cases=cases,
    backward=backward,
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 8e-3), torch.float16: (2e-3, 2e-3)},
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def merge_tokens(x: torch.Tensor, plan: MergePlan, reduction: str = "mean") -> torch.Tensor:
    """Merge tokens: each row of the result is the mean (or sum) of a destination and the sources matched with it.

    `y[i] = mean over tokens t of row i of x[t]`, rows in the order kept, unmerged sources, destinations, protected. The
    same plan serves queries, keys and values: call once for each. Sums are float32 in a fixed order: every run gives
    the same bits. Differentiable with respect to x.

    Args:
        x: [B, N, C], float32, bfloat16 or float16, any strides.
        plan: of `match_tokens`, on the device of x.
        reduction: "mean" or "sum". A mean weighted by the size of tokens (ToMe) is the sum of `x * size` over the
            sum of `size`.

    Returns:
        [B, N_m, C], dtype of x. NaN and infinity stay within the rows they are merged into.

    Raises:
        ValueError: wrong rank, other sizes or another device than the plan's, an unknown reduction.
        TypeError: another dtype.

    Source: FastVGGT (Shen et al., 2025); ToMe (Bolya et al., ICLR 2023), which merge by scatter-mean.
    """
    op = "token_merging"
    check_rows(op, "x", x, plan, plan.tokens, "[B, N, C]")
    check_choice(op, "reduction", reduction, REDUCTIONS)
    return (_op if is_compiling() else _call)(x, plan.offsets, plan.members, reduction == "mean")
