"""A plan behind HTTP, under load. A server is no call of an op: `load.py` is run by itself."""
