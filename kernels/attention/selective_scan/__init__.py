"""Mamba's selective scan, and its mixer one way or both."""

from planmill.kernels.attention.selective_scan.layer import MambaMixer
from planmill.kernels.attention.selective_scan.op import scan_selectively

__all__ = ["MambaMixer", "scan_selectively"]
