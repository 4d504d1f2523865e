"""How a model becomes a plan and a plan runs; the only place that knows TensorRT."""

if __name__ != "planmill.engine":
    raise ImportError(f"this package is planmill.engine; it was imported as {__name__!r}")

__all__: list[str] = []
