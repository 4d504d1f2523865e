"""A plan behind HTTP: `planmill serve`. Needs the extra `serve`."""
