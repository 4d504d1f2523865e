"""Hashed lookups of many features in one shared table."""

from planmill.kernels.routing.hash_embedding.layer import HashEmbedding
from planmill.kernels.routing.hash_embedding.op import embed_hashed

__all__ = ["HashEmbedding", "embed_hashed"]
