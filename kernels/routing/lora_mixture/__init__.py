"""A linear layer with low-rank adapters that are mixed by weights of each sample."""

from planmill.kernels.routing.lora_mixture.layer import LoraMix
from planmill.kernels.routing.lora_mixture.op import mix_adapters

__all__ = ["LoraMix", "mix_adapters"]
