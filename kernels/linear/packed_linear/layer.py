"""PackedLinear: a linear layer around the op."""

import torch
from torch import nn

from planmill.kernels.linear.packed_linear.op import apply_packed_weight
from planmill.kernels.linear.packed_linear.packing import pack_weight


class PackedLinear(nn.Module):
    """nn.Linear for inference in float32 on a CPU, with the activation behind it.

    It holds the packed weight alone; a state dict of nn.Linear loads by its names (`weight`, `bias`) and is packed on
    the way in.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is one.
        activation: "none", "gelu" (with erf), "gelu_tanh", "relu" or "silu".

    Shapes: x [..., K] -> [..., N].

    Source: Goto and van de Geijn, "Anatomy of high-performance matrix multiplication" (ACM TOMS 2008), section 5.
    """

    packed: torch.Tensor
    bias: torch.Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = "none") -> None:
        super().__init__()
        self.activation = activation
        start = nn.Linear(in_features, out_features, bias=bias)
        self.register_buffer("packed", pack_weight(start.weight.detach().float()))
        shift = torch.zeros(out_features) if start.bias is None else start.bias.detach().float()
        self.register_buffer("bias", shift, persistent=bias)

    @classmethod
    def from_linear(cls, source: nn.Linear, activation: str = "none") -> "PackedLinear":
        """The layer with the weights of a linear layer."""
        layer = cls(source.in_features, source.out_features, source.bias is not None, activation)
        layer.load_state_dict(source.state_dict())
        return layer

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}packed"] = pack_weight(state_dict.pop(f"{prefix}weight").float())
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to `x`."""
        return apply_packed_weight(x, self.packed, self.bias, activation=self.activation)
