"""Correlation attention: softmax attention of queries with queries, keys with keys and values with values."""

from planmill.kernels.attention.correlation_attention.layer import CorrelationAttention, CorrelationBlock
from planmill.kernels.attention.correlation_attention.op import attend_by_correlation, attend_in_two_streams
from planmill.kernels.attention.correlation_attention.result import Streams
from planmill.kernels.attention.correlation_attention.surgery import remove_redundancy

__all__ = [
    "CorrelationAttention",
    "CorrelationBlock",
    "Streams",
    "attend_by_correlation",
    "attend_in_two_streams",
    "remove_redundancy",
]
