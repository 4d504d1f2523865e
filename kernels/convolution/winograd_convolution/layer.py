"""WinogradConv2d: a convolution layer around the op."""

import torch
from torch import nn

from planmill.kernels.convolution.winograd_convolution.op import convolve_with_winograd
from planmill.kernels.convolution.winograd_convolution.transform import SIZES, transform_weight


class WinogradConv2d(nn.Module):
    """nn.Conv2d of stride one for inference: square kernels of 2 to 5 taps a side, zero padding, all channels.

    It holds the transformed kernel alone, 36 / r^2 times the weight's size; a state dict of nn.Conv2d loads by its
    names (`weight`, `bias`) and is transformed on the way in.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: r.
        padding: zeros on every side.
        bias: whether there is one.

    Shapes: x [B, C, H, W] -> [B, K, H + 2 padding - r + 1, W + 2 padding - r + 1].

    Source: Lavin and Gray, "Fast algorithms for convolutional neural networks" (CVPR 2016), section 4.
    """

    transformed: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__()
        self.kernel_size, self.padding = kernel_size, padding
        start = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.register_buffer("transformed", transform_weight(start.weight.detach()))
        shift = torch.zeros(out_channels) if start.bias is None else start.bias.detach().float()
        self.register_buffer("bias", shift, persistent=bias)

    @classmethod
    def from_conv2d(cls, source: nn.Conv2d) -> "WinogradConv2d":
        """The layer with the weights of a convolution.

        Raises:
            ValueError: the convolution has a stride, a dilation, groups, another padding or another kernel.
        """
        size, padding = source.kernel_size[0], source.padding if isinstance(source.padding, str) else source.padding[0]
        plain = (
            source.kernel_size == (size, size)
            and size in SIZES
            and source.stride == (1, 1)
            and source.dilation == (1, 1)
            and source.groups == 1
            and source.padding == (padding, padding)
            and (padding == 0 or source.padding_mode == "zeros")
        )
        if not plain:
            raise ValueError(
                "WinogradConv2d.from_conv2d: the convolution must have a square kernel of 2 to 5 taps a side, stride "
                f"1, dilation 1, one group and zero padding, got {source}"
            )
        layer = cls(source.in_channels, source.out_channels, size, int(padding), source.bias is not None)
        layer.load_state_dict(source.state_dict())
        return layer

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}transformed"] = transform_weight(state_dict.pop(f"{prefix}weight"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve `x`."""
        return convolve_with_winograd(x, self.transformed, self.bias, size=self.kernel_size, padding=self.padding)
