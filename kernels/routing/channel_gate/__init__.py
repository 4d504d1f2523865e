"""Channel gates: y = x (c0 + c1 g), with a gate from the channel's mean, a small network, a class pair or a table."""

from planmill.kernels.routing.channel_gate.fold import fold_gate
from planmill.kernels.routing.channel_gate.gate import average_channels, gate_by_mean, gate_channels
from planmill.kernels.routing.channel_gate.layer import FieldGate, PairGate, SqueezeGate, StepGate

__all__ = [
    "FieldGate",
    "PairGate",
    "SqueezeGate",
    "StepGate",
    "average_channels",
    "fold_gate",
    "gate_by_mean",
    "gate_channels",
]
