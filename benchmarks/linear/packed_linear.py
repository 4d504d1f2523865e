"""apply_packed_weight at the layers of a ViT-S/16 (197 tokens) and of the digits model (64 tokens), GELU behind the
first of a perceptron.

The peers' weights, and ours, are prepared beforehand. Error: largest difference from float64, over the largest result.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from planmill.kernels.linear import apply_packed_weight, pack_weight

from ..cases import Case, Draw, Peer

PACKED, EAGER = "oneDNN, weight packed", "torch linear"
LAYERS = {  # tokens, K, N, activation
    "vit_small_qkv": (197, 384, 1152, "none"),
    "vit_small_proj": (197, 384, 384, "none"),
    "vit_small_fc1": (197, 384, 1536, "gelu"),
    "vit_small_fc2": (197, 1536, 384, "none"),
    "digits_fc1": (64, 96, 384, "gelu"),
    "digits_fc2": (64, 384, 96, "none"),
}


def make(rows: int, channels: int, outputs: int, activation: str) -> Callable[[Draw], tuple]:
    """Tokens, a weight that keeps their size, and what we make of it."""

    def draw_all(draw: Draw) -> tuple:
        weight = draw.normal(outputs, channels) / channels**0.5
        return draw.normal(rows, channels), weight, draw.normal(outputs), pack_weight(weight), activation

    return draw_all


def ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, packed: torch.Tensor, activation: str) -> Any:
    """One layer."""
    return apply_packed_weight(x, packed, bias, activation=activation)


def eager(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.Tensor, activation: str) -> Callable:
    """PyTorch's layer, for which MKL packs the weight at every call, and its GELU."""
    if activation == "gelu":
        return lambda: F.gelu(F.linear(x, weight, bias))
    return lambda: F.linear(x, weight, bias)


def frozen(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, _: torch.Tensor, activation: str) -> Callable:
    """oneDNN's layer with the weight packed for it and the GELU inside, as a frozen program calls it."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, len(x))
    return lambda: torch.ops.mkldnn._linear_pointwise(x, packed, bias, activation, [], "none")


def check(args: tuple, found: torch.Tensor) -> float:
    """Some random rows in float64."""
    x, weight, bias, _, activation = args
    rows = torch.randint(len(x), (32,))
    want = F.linear(x[rows].double(), weight.double(), bias.double())
    want = F.gelu(want) if activation == "gelu" else want
    return float((found[rows].double() - want).abs().max() / want.abs().max())


CASES = [
    Case(
        op="packed_linear",
        id=f"{name}-{batch}",
        make=make(batch * rows, *sizes),
        small=make(5, 8, 24, sizes[-1]),
        ours=ours,
        peers={PACKED: Peer(frozen, devices=("cpu",)), EAGER: Peer(eager, devices=("cpu",))},
        check=check,
        tolerance={torch.float32: 1e-5},
        flops=lambda x, weight, *_: 2.0 * len(x) * weight.numel(),
        dtypes=(torch.float32,),
        devices=("cpu",),
        calls=max(1, round(2e9 / (batch * rows * sizes[0] * sizes[1]))),  # some 20 ms: cores wake up slowly
    )
    for name, (rows, *sizes) in LAYERS.items()
    for batch in (1, 16)
]
