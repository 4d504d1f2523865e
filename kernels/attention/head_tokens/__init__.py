"""Head tokens (DHVT): one token for each head among the others, and the feed-forward layer that goes with them."""

from planmill.kernels.attention.head_tokens.feed_forward import ConvolutionalFeedForward
from planmill.kernels.attention.head_tokens.layer import HeadTokenAttention, make_head_tokens

__all__ = ["ConvolutionalFeedForward", "HeadTokenAttention", "make_head_tokens"]
