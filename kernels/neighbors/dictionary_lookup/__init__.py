"""Sparse lookup in a dictionary of keys and values, and DictAS's layer around it."""

from planmill.kernels.neighbors.dictionary_lookup.layer import DictionaryLookup, TokenGenerator
from planmill.kernels.neighbors.dictionary_lookup.op import lookup_dictionary

__all__ = ["DictionaryLookup", "TokenGenerator", "lookup_dictionary"]
