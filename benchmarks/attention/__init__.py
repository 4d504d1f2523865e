"""Attention ops: one file per op, its cases and its peers."""
