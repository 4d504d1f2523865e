"""Similarity attention: values mixed as other features of the same places are alike."""

from planmill.kernels.attention.similarity_attention.op import attend_by_similarity

__all__ = ["attend_by_similarity"]
