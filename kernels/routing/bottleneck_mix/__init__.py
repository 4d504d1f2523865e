"""A mixture of bottleneck filters, gated per sample or per position: made of other ops, with none of its own."""

from planmill.kernels.routing.bottleneck_mix.layer import BottleneckMix

__all__ = ["BottleneckMix"]
