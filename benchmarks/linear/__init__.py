"""Benchmarks of the convolution family."""
