"""Our ops as TensorRT plugins, derived from their OpSpec: adding an op adds no line here."""

from planmill.engine.plugins.fields import PLUGIN_VERSION, plugin_name
from planmill.engine.plugins.python import register_creators

__all__ = ["PLUGIN_VERSION", "plugin_name", "register_creators"]
