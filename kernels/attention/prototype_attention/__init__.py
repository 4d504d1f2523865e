"""INP-Former: prototypes taken from an image, and attention of its tokens to them."""

from planmill.kernels.attention.prototype_attention.layer import PrototypeAttention, PrototypeBlock, PrototypeExtractor
from planmill.kernels.attention.prototype_attention.op import mix_prototypes

__all__ = ["PrototypeAttention", "PrototypeBlock", "PrototypeExtractor", "mix_prototypes"]
