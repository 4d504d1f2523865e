"""Our ops as TensorRT plugins, derived from their OpSpec: adding an op adds no line here."""

from planmill.engine.plugins.fields import PLUGIN_VERSION, plugin_name
from planmill.engine.plugins.python import DTYPES, register_creators, torch_dtype

__all__ = ["DTYPES", "PLUGIN_VERSION", "plugin_name", "register_creators", "torch_dtype"]
