"""router_logits: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_device, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.router_logits.cases import cases, compare
from planmill.kernels.routing.router_logits.reference import router_logits_reference


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """The gradient of a linear layer."""
    x, weight, bias = args
    g = grads[0].float()
    for_bias = g.sum(0).to(bias.dtype) if bias.numel() else torch.zeros_like(bias)
    return (g @ weight.float()).to(x.dtype), (g.T @ x.float()).to(weight.dtype), for_bias


SPEC = OpSpec(
    schema="router_logits(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    outputs=lambda x, weight, bias: [((x.shape[0], weight.shape[0]), torch.float32)],
    reference=router_logits_reference,
    cases=cases,
    compare=compare,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-6, 0.0)),
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def score_experts(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Logits of a router: l[t, e] = sum_d x[t, d] W[e, d] + b[e], in float32.

    A token's logits have the same bits whatever else is in the batch. A matrix product chooses its order of summation
    by the number of rows, and the last bit that it changes can choose another expert.

    Args:
        x: [T, D], float32, bfloat16 or float16, any strides.
        weight: [E, D], one of these dtypes, not necessarily that of x.
        bias: [E], one of these dtypes, or None.

    Returns:
        [T, E] float32: products and sums are float32. A model whose router works in its own dtype rounds them:
        `.to(x.dtype)`.

    Raises:
        ValueError: wrong ranks or sizes, tensors on different devices.
        TypeError: another dtype.

    Source: the router of Shazeer et al., "Outrageously large neural networks" (ICLR 2017), section 2.1, without noise.
    """
    op = "router_logits"
    check_rank(op, "x", x, 2, "[T, D]")
    check_rank(op, "weight", weight, 2, "[E, D]")
    check_float(op, "x", x)
    check_float(op, "weight", weight)
    check_device(op, "weight", weight, "x", x)
    if weight.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: weight must be [E, {x.shape[1]}] like x, got {list(weight.shape)}")
    if bias is None:
        bias = x.new_empty(0)
    else:
        check_float(op, "bias", bias)
        check_device(op, "bias", bias, "x", x)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{op}: bias must be [{weight.shape[0]}], got {list(bias.shape)}")
    return (_op if is_compiling() else _call)(x, weight, bias)
