"""Mixture of hidden dimensions: linear layers that read or write shared sub-dimensions and a few routed groups."""

from planmill.kernels.routing.hidden_mixture.layer import HiddenLinear, HiddenMixture
from planmill.kernels.routing.hidden_mixture.selection import select_hidden

__all__ = ["HiddenLinear", "HiddenMixture", "select_hidden"]
