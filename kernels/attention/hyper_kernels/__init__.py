"""HyperZ.Z.W operators: activations times a kernel that a small network makes from coordinates, times activations."""

from planmill.kernels.attention.hyper_kernels.layer import GlobalHyperKernel, LocalHyperKernel, SlowNet
from planmill.kernels.attention.hyper_kernels.products import filter_by_sample, gate_by_kernels, multiply_with_kernel

__all__ = [
    "GlobalHyperKernel",
    "LocalHyperKernel",
    "SlowNet",
    "filter_by_sample",
    "gate_by_kernels",
    "multiply_with_kernel",
]
