"""Sparse lookup in a dictionary of keys and values."""

from planmill.kernels.neighbors.dictionary_lookup.op import lookup_dictionary

__all__ = ["lookup_dictionary"]
