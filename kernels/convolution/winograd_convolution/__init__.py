"""Dense convolutions of stride one, by Winograd's minimal filtering."""

from planmill.kernels.convolution.winograd_convolution.layer import WinogradConv2d
from planmill.kernels.convolution.winograd_convolution.op import convolve_with_winograd
from planmill.kernels.convolution.winograd_convolution.transform import transform_weight

__all__ = ["WinogradConv2d", "convolve_with_winograd", "transform_weight"]
