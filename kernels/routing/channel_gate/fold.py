"""Folding a fixed gate into the layer that follows it."""

import copy

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from planmill.kernels.common.checks import check_float


def fold_gate(gate: torch.Tensor, module: nn.Module, *, base: float = 0.0, slope: float = 1.0) -> nn.Module:
    """The layer after a fixed gate, with the gate in its weights: `fold(gate, f)(x) = f(gate_channels(x, gate))`.

    `W'[o, c] = W[o, c] * (base + slope * gate[c])`: one gate for all inputs. A gate computed from the input itself
    (`gate_by_mean`, Squeeze-and-Excitation) differs between samples and cannot be folded.

    Args:
        gate: [C], float32, bfloat16 or float16; C is the number of input channels of `module`.
        module: nn.Linear, or a convolution or transposed convolution of one, two or three dimensions, with any groups,
            stride and padding. It is not changed.
        base, slope: as in `gate_channels`.

    Returns:
        A copy of `module` with its own weight; equal up to the rounding of the products to the weight's dtype.

    Raises:
        ValueError: a gate that is not [C].
        TypeError: another dtype, or another kind of module.

    Source: ours; a gate per channel is a diagonal matrix, which a linear map absorbs.
    """
    op = "fold_gate"
    if not isinstance(module, nn.Linear | _ConvNd):
        raise TypeError(f"{op}: module must be nn.Linear or a convolution, got {type(module).__name__}")
    channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
    check_float(op, "gate", gate)
    if tuple(gate.shape) != (channels,):
        raise ValueError(f"{op}: gate must be [{channels}] like the module's input channels, got {list(gate.shape)}")
    weight = module.weight.detach()
    factor = (base + slope * gate.detach().float()).to(weight.device)
    if isinstance(module, _ConvTransposeNd):  # weight [C, O / groups, ...]
        factor = factor.view(-1, *[1] * (weight.dim() - 1))
    elif isinstance(module, _ConvNd):  # weight [O, C / groups, ...]: output o reads the channels of its own group
        per_group = factor.view(module.groups, 1, -1).expand(-1, weight.shape[0] // module.groups, -1)
        factor = per_group.reshape(weight.shape[0], -1, *[1] * (weight.dim() - 2))
    folded = copy.deepcopy(module)
    folded.weight = nn.Parameter((weight * factor).to(weight.dtype), requires_grad=module.weight.requires_grad)
    return folded
