"""Large-kernel attention (VAN): two depthwise convolutions and a pointwise one, times the input."""

from planmill.kernels.attention.large_kernel_attention.layer import GatedLargeKernel, LargeKernelAttention
from planmill.kernels.attention.large_kernel_attention.op import attend_with_large_kernel

__all__ = ["GatedLargeKernel", "LargeKernelAttention", "attend_with_large_kernel"]
