"""ConvolutionStem: a convolution layer with its activation and its pooling around the op."""

import torch
from torch import nn

from planmill.kernels.convolution.stem_convolution.op import convolve_and_pool
from planmill.kernels.convolution.stem_convolution.packing import pack_kernel


class ConvolutionStem(nn.Module):
    """nn.Conv2d, and the nn.ReLU and the pooling behind it if there are any, for inference on images of few channels.

    It holds the packed kernel alone; a state dict of nn.Conv2d loads by its names (`weight`, `bias`) and is packed on
    the way in.

    Args:
        in_channels: C.
        out_channels: K.
        kernel_size: r, s.
        stride: of the convolution.
        padding: zeros on every side.
        bias: whether there is one.
        activation: "none" or "relu".
        pool: nn.MaxPool2d or nn.AvgPool2d of square windows, without dilation, ceil_mode, indices or a divisor.

    Shapes: x [B, C, H, W] -> [B, K, H', W'], as nn.Conv2d and the pooling give them.

    Raises:
        ValueError: a pooling with other settings.

    Source: He et al., "Deep residual learning" (CVPR 2016), table 1.
    """

    packed: torch.Tensor
    bias: torch.Tensor

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int = 1,
        padding: int = 0,
        bias: bool = True,
        activation: str = "none",
        pool: nn.MaxPool2d | nn.AvgPool2d | None = None,
    ) -> None:
        super().__init__()
        self.stride, self.padding, self.activation = stride, padding, activation
        self.pooling, self.window = _window(pool)
        self.count_include_pad = bool(getattr(pool, "count_include_pad", True))
        start = nn.Conv2d(in_channels, out_channels, kernel_size, bias=bias)
        self.register_buffer("packed", pack_kernel(start.weight.detach()))
        shift = torch.zeros(out_channels) if start.bias is None else start.bias.detach().float()
        self.register_buffer("bias", shift, persistent=bias)

    @classmethod
    def from_layers(
        cls, source: nn.Conv2d, activation: str = "none", pool: nn.MaxPool2d | nn.AvgPool2d | None = None
    ) -> "ConvolutionStem":
        """The layer with the weights of a convolution.

        Raises:
            ValueError: the convolution has two strides or paddings, a dilation, groups or another kind of padding; a
                pooling with other settings.
        """
        stride, padding = source.stride[0], source.padding
        plain = (
            source.stride == (stride, stride)
            and source.dilation == (1, 1)
            and source.groups == 1
            and not isinstance(padding, str)
            and len({*padding}) == 1
            and (padding[0] == 0 or source.padding_mode == "zeros")
        )
        if not plain:
            raise ValueError(
                "ConvolutionStem.from_layers: the convolution must have one stride and one padding for both sides, "
                f"dilation 1, one group and zero padding, got {source}"
            )
        size = (source.kernel_size[0], source.kernel_size[1])
        layer = cls(
            source.in_channels,
            source.out_channels,
            size,
            stride,
            int(padding[0]),
            source.bias is not None,
            activation,
            pool,
        )
        layer.load_state_dict(source.state_dict())
        return layer

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}packed"] = pack_kernel(state_dict.pop(f"{prefix}weight"))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve, activate and pool `x`."""
        size, stride, padding = self.window
        return convolve_and_pool(
            x,
            self.packed,
            self.bias,
            stride=self.stride,
            padding=self.padding,
            activation=self.activation,
            pooling=self.pooling,
            pool_size=size,
            pool_stride=stride,
            pool_padding=padding,
            count_include_pad=self.count_include_pad,
        )


def _window(pool: nn.MaxPool2d | nn.AvgPool2d | None) -> tuple[str, tuple[int, int, int]]:
    """The pooling's name; size, stride and padding of its windows."""
    if pool is None:
        return "none", (1, 1, 0)
    settings = (pool.kernel_size, pool.kernel_size if pool.stride is None else pool.stride, pool.padding)
    pairs = [value if isinstance(value, tuple) else (value, value) for value in settings]
    plain = (
        all(first == second for first, second in pairs)
        and not pool.ceil_mode
        and getattr(pool, "dilation", 1) in (1, (1, 1))
        and not getattr(pool, "return_indices", False)
        and getattr(pool, "divisor_override", None) is None
    )
    if not plain:
        raise ValueError(
            "ConvolutionStem: the pooling must have square windows, and no dilation, ceil_mode, indices or divisor, "
            f"got {pool}"
        )
    (size, _), (stride, _), (padding, _) = pairs
    return "max" if isinstance(pool, nn.MaxPool2d) else "average", (size, stride, padding)
