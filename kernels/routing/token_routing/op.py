"""token_routing: schema, shape rule, checks and the public functions."""

import math

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.token_routing.cases import cases, compare
from planmill.kernels.routing.token_routing.reference import NOTHING, token_routing_reference, weigh

MAX_EXPERTS = 1024
SCORES = ("softmax", "sigmoid")
ORDERS = ("score_then_topk", "topk_then_softmax")
PRIORITIES = ("order", "score")


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient of the weights with respect to the logits; the choice is held fixed, also where a weight was dropped."""
    logits, _, _, score, order, renormalize, eps, scale = args[:8]
    weights, chosen = _op(*args[:11], 0, 0, "order") if args[11] else outputs
    x = logits.detach().double().masked_fill(logits.isnan(), NOTHING).requires_grad_()
    with torch.enable_grad():
        a = weigh(x, chosen.long(), weights.detach() != 0, score, order, renormalize, eps)
    gradient = torch.where(outputs[1] >= 0, grads[0].double() * scale, 0)
    return torch.autograd.grad(a, x, gradient)[0].to(logits.dtype), *[None] * 13


SPEC = OpSpec(
    schema="token_routing(Tensor logits, Tensor bias, int k, str score, str order, bool renormalize, float eps, "
    "float scale, int groups, int top_groups, bool mask_with_zero, int capacity, int capacity_group, "
    "str capacity_priority) -> (Tensor, Tensor)",
    outputs=lambda logits, bias, k, *options: [
        ((logits.shape[0], k), torch.float32),
        ((logits.shape[0], k), torch.int32),
    ],
    reference=token_routing_reference,
    cases=cases,
    compare=compare,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-6, 1e-5)),  # logits are exact
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def route_tokens(
    logits: torch.Tensor,
    k: int,
    *,
    score: str = "softmax",
    order: str = "score_then_topk",
    renormalize: bool = False,
    eps: float = 0.0,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    groups: int = 1,
    top_groups: int = 1,
    group_mask_value: float = -math.inf,
    capacity: int | None = None,
    capacity_group: int | None = None,
    capacity_priority: str = "order",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k experts each token goes to and the weights of their results, from the router's logits.

        p = softmax over the experts, or sigmoid, of l            (order "score_then_topk")
        q = p + bias; experts outside the chosen groups get `group_mask_value`
        idx = the k largest of q;  a = p[idx];  a = a / (sum a + eps) if `renormalize`;  a = scale * a

    With order "topk_then_softmax", q = l + bias and a = softmax of the k chosen logits (`renormalize` and `eps` change
    nothing then). Groups are E / groups experts that follow each other; a group counts as much as its two largest q
    together (its only one, if it has one), and the `top_groups` best are chosen. Everything is computed in float32;
    without bias and groups the logits themselves are ranked, which no rounding of the scores can disturb.

    A NaN logit is taken as -inf. An expert with logit -inf has weight 0 and is chosen only where no other is left, as
    is one that -inf masks. The weights are NaN only where all logits of a token are. Logits of +inf share the whole
    softmax. Sigmoids far below zero keep their proportions when renormalised.

    With `capacity`, an expert takes at most so many tokens of a group of `capacity_group` consecutive tokens: first
    choices first, then second choices and so on; within one choice in the order of the tokens, or by descending largest
    weight (`capacity_priority="score"`; equal ones in order). What is left over gets index -1 and weight 0, and the
    token's other weights stay as they are. Only then does a token's routing depend on the others of its group.

    Args:
        logits: [T, E], float32, bfloat16 or float16, any strides; at most 1024 experts.
        k: experts per token, 1 to E.
        score: "softmax" or "sigmoid".
        order: "score_then_topk" or "topk_then_softmax" (score "softmax" only).
        renormalize: divide by the sum of the k weights plus `eps`.
        eps: not negative; DeepSeek-V3 has 1e-20.
        scale: multiplies the weights.
        bias: [E], float32, or None: added for the choice only, not to the weights; it gets no gradient.
        groups: number of groups, a divisor of E; 1: no groups.
        top_groups: groups that a token may choose from; they must hold k experts.
        group_mask_value: -inf, or 0.0 as in the first published DeepSeek-V3 code, where an expert outside the groups
            wins over one with a negative q.
        capacity: tokens an expert takes per group of tokens (`expert_capacity`), or None: all.
        capacity_group: tokens of a group, or None: all T are one group. The last group may be short.
        capacity_priority: "order" or "score".

    Returns:
        indices: [T, k] int32, best first by q; ties go to the lower index; -1 where an assignment was dropped.
        weights: [T, k] float32; the gradient reaches `logits` through them, with the choice held fixed.

    Raises:
        ValueError: wrong rank or shape, k outside 1..E, more than 1024 experts, an unknown score, order or priority,
            "topk_then_softmax" with sigmoid, groups that do not divide E or hold fewer than k experts, another mask
            value, a negative eps, capacity or capacity_group below 1, capacity_group without capacity.
        TypeError: another dtype.

    Source: softmax: Shazeer et al., ICLR 2017, and Mixtral (Jiang et al., 2024); sigmoid, bias and groups: DeepSeek-V3
    technical report (2024), section 2.1.2; capacity and its order: V-MoE (Riquelme et al., NeurIPS 2021), section 2 and
    appendix. Ties, NaN and infinity are left open there.
    """
    op = "token_routing"
    check_rank(op, "logits", logits, 2, "[T, E]")
    check_float(op, "logits", logits)
    experts = logits.shape[1]
    if not 1 <= k <= experts:
        raise ValueError(f"{op}: k must be from 1 to E = {experts}, got {k}")
    if experts > MAX_EXPERTS:
        raise ValueError(f"{op}: logits must be [T, E] with at most {MAX_EXPERTS} experts, got {list(logits.shape)}")
    check_choice(op, "score", score, SCORES)
    check_choice(op, "order", order, ORDERS)
    if order == "topk_then_softmax" and score != "softmax":
        raise ValueError(f"{op}: order 'topk_then_softmax' needs score 'softmax', got {score!r}")
    if not eps >= 0:
        raise ValueError(f"{op}: eps must not be negative, got {eps}")
    if groups != 1:
        _check_groups(experts, k, groups, top_groups, group_mask_value)
    if bias is None:
        bias = logits.new_empty(0, dtype=torch.float32)
    else:
        _check_bias(bias, logits)
    if capacity is not None or capacity_group is not None:
        _check_capacity(capacity, capacity_group, capacity_priority)
    weights, indices = (_op if is_compiling() else _call)(
        logits, bias, k, score, order, renormalize, eps, scale, groups, top_groups if groups > 1 else 1,
        groups > 1 and group_mask_value == 0, capacity or 0, capacity_group or 0, capacity_priority,
    )  # fmt: skip
    return indices, weights


def _check_groups(experts: int, k: int, groups: int, top_groups: int, value: float) -> None:
    op = "token_routing"
    if groups < 1 or experts % groups:
        raise ValueError(f"{op}: groups must divide E = {experts}, got {groups}")
    if not 1 <= top_groups <= groups:
        raise ValueError(f"{op}: top_groups must be from 1 to groups = {groups}, got {top_groups}")
    if top_groups * (experts // groups) < k:
        held = top_groups * (experts // groups)
        raise ValueError(f"{op}: top_groups must hold k = {k} experts, got {top_groups} groups with {held}")
    if value not in (0, -math.inf):
        raise ValueError(f"{op}: group_mask_value must be -inf or 0.0, got {value}")


def _check_bias(bias: torch.Tensor, logits: torch.Tensor) -> None:
    op = "token_routing"
    if bias.dtype is not torch.float32:
        raise TypeError(f"{op}: bias must be torch.float32, got {bias.dtype}")
    if bias.dim() != 1 or bias.shape[0] != logits.shape[1]:
        raise ValueError(f"{op}: bias must be [E] with E = {logits.shape[1]}, got {list(bias.shape)}")
    if bias.device != logits.device:
        raise ValueError(f"{op}: bias must be on {logits.device} like logits, got {bias.device}")


def _check_capacity(capacity: int | None, group: int | None, priority: str) -> None:
    op = "token_routing"
    check_choice(op, "capacity_priority", priority, PRIORITIES)
    if capacity is None:
        raise ValueError(f"{op}: capacity_group needs a capacity, got None")
    for name, value in (("capacity", capacity), ("capacity_group", group)):
        if value is not None and value < 1:
            raise ValueError(f"{op}: {name} must be at least 1, got {value}")


def expert_capacity(tokens: int, k: int, experts: int, factor: float, *, multiple_of: int = 4) -> int:
    """Tokens that an expert takes per group: tokens * k * factor / experts, rounded up to a multiple of `multiple_of`.

    Args:
        tokens: tokens of a group.
        k: experts per token.
        experts: number of experts E.
        factor: capacity factor: 1 is just enough if all experts are chosen equally often. V-MoE has 1.05.
        multiple_of: 4 as published.

    Returns:
        The capacity for `route_tokens`: ceil(tokens * k * factor / experts), then rounded up.

    Raises:
        ValueError: an argument that is not positive.

    Source: the code published with V-MoE (Riquelme et al., NeurIPS 2021).
    """
    arguments = {"tokens": tokens, "k": k, "experts": experts, "factor": factor, "multiple_of": multiple_of}
    for name, value in arguments.items():
        if not value > 0:
            raise ValueError(f"expert_capacity: {name} must be positive, got {value}")
    needed = math.ceil(tokens * k * factor / experts)
    return -(-needed // multiple_of) * multiple_of
