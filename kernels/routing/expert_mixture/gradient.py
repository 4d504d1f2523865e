"""The gradient of expert_mixture, by expert and in float32; an op of its own, since no graph holds an expert's rows."""

from collections.abc import Callable

import torch
from torch.nn import functional as F

from planmill.kernels.routing.expert_mixture.reference import ACTIVATIONS

SLOPES: dict[str, Callable[..., torch.Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


@torch.library.custom_op("planmill::expert_mixture_gradient", mutates_args=())
def expert_mixture_gradient(
    grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor,
    up_bias: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor, activation: str, weight_on_input: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Gradients of x, weights, up, up_bias, down, down_bias; the letters are those of `mix_experts`."""
    inputs = (x, weights, up, up_bias, down, down_bias)
    for_x, for_a, for_up, for_b, for_down, for_c = made = [torch.zeros_like(t, dtype=torch.float32) for t in inputs]
    f = down.shape[2]
    gated = up.shape[1] != f
    for e in range(up.shape[0]):
        t, j = (indices == e).nonzero(as_tuple=True)
        if t.numel() == 0:
            continue
        a, v, dy, w, d = weights[t, j, None].float(), x[t].float(), grad[t].float(), up[e].float(), down[e].float()
        scaled = a * v if weight_on_input else v
        z = F.linear(scaled, w, up_bias[e].float() if up_bias.numel() else None)
        g, u = (z[:, :f], z[:, f:]) if gated else (z, None)
        s = ACTIVATIONS[activation](g)
        h = s * u if u is not None else s
        dh = dy @ d
        if not weight_on_input:
            bias = (dy * down_bias[e].float()).sum(1) if down_bias.numel() else 0
            for_a[t, j] = (dh * h).sum(1) + bias
            dh, dy = a * dh, a * dy
        for_down[e] = dy.T @ h
        dg = SLOPES[activation](dh * u if u is not None else dh, g)
        dz = torch.cat([dg, dh * s], 1) if u is not None else dg
        for_up[e] = dz.T @ scaled
        if up_bias.numel():
            for_b[e] = dz.sum(0)
        if down_bias.numel():
            for_c[e] = dy.sum(0)
        dv = dz @ w
        if weight_on_input:
            for_a[t, j] = (dv * v).sum(1)
            dv = a * dv
        for_x.index_add_(0, t, dv)
    return [m.to(t.dtype) for m, t in zip(made, inputs, strict=True)]


@expert_mixture_gradient.register_fake
def _(grad: torch.Tensor, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor,
      up_bias: torch.Tensor, down: torch.Tensor, down_bias: torch.Tensor, activation: str, weight_on_input: bool,
) -> list[torch.Tensor]:  # fmt: skip
    return [torch.empty_like(t) for t in (x, weights, up, up_bias, down, down_bias)]


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """One gradient per argument of the op. On a GPU it waits for the device once an expert, for its number of rows."""
    x, weights, up, up_bias, down, down_bias = expert_mixture_gradient(grads[0], *args)
    return x, None, weights, up, up_bias, down, down_bias, None, None
