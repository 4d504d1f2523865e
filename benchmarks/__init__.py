"""What Planmill's ops are measured against. Not part of the wheel: `planmill bench` loads it from the checkout."""

from . import cases, harness, machine, memory, plot, report, timing

__all__ = ["cases", "harness", "machine", "memory", "plot", "report", "timing"]
