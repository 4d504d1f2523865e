"""Linear layers with their weight in panels and their activation inside."""

from planmill.kernels.linear.packed_linear.layer import PackedLinear
from planmill.kernels.linear.packed_linear.op import apply_packed_weight
from planmill.kernels.linear.packed_linear.packing import pack_weight

__all__ = ["PackedLinear", "apply_packed_weight", "pack_weight"]
