"""A network's first layer: convolution of an image of few channels, ReLU and pooling as one."""

from planmill.kernels.convolution.stem_convolution.layer import ConvolutionStem
from planmill.kernels.convolution.stem_convolution.op import convolve_and_pool
from planmill.kernels.convolution.stem_convolution.packing import pack_kernel

__all__ = ["ConvolutionStem", "convolve_and_pool", "pack_kernel"]
