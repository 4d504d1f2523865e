"""Benchmarks of the moments family."""
