"""Soft mixtures of experts: the weights by which slots take tokens and tokens take slots, and the layer."""

from planmill.kernels.routing.slot_weights.layer import SoftMoE
from planmill.kernels.routing.slot_weights.op import weigh_slots

__all__ = ["SoftMoE", "weigh_slots"]
