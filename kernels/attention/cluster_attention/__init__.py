"""Attention inside clusters of tokens that are near each other (Routing Transformer), and the layers around it."""

from planmill.kernels.attention.cluster_attention.layer import ClusterAttention, ClusterSelfAttention
from planmill.kernels.attention.cluster_attention.op import attend_in_clusters

__all__ = ["ClusterAttention", "ClusterSelfAttention", "attend_in_clusters"]
