"""Classification and scoring by retrieval, without training."""

from planmill.kernels.neighbors.retrieval.layer import Retriever
from planmill.kernels.neighbors.retrieval.vote import retrieve_values, vote_by_class

__all__ = ["Retriever", "retrieve_values", "vote_by_class"]
