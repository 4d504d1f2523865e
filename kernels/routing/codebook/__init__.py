"""Codebook features: activations replaced by the mean of the nearest codes."""

from planmill.kernels.routing.codebook.layer import Codebook, GroupedCodebook

__all__ = ["Codebook", "GroupedCodebook"]
