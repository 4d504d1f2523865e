"""What an op's scalar arguments are called and how they travel as plugin fields: ONNX node -> builder -> plan."""

from typing import Any

import numpy as np

from planmill.kernels import OpSpec

# Raised when the meaning of an op's arguments changes: a plan with an older plugin then says so when it is loaded.
PLUGIN_VERSION = "1"

# Kind of argument in the schema -> type of plugin field, dtype of its data.
_FIELDS: dict[str, tuple[str, Any]] = {
    "int": ("INT64", np.int64),
    "float": ("FLOAT32", np.float32),
    "bool": ("INT64", np.int64),
    "str": ("CHAR", None),
}


def plugin_name(op: str) -> str:
    """The plugin's name of an op named as in a manifest: "planmill::knn" -> "knn"."""
    return op.partition("::")[2] or op


def scalar_arguments(spec: OpSpec) -> dict[str, str]:
    """Name -> kind of every argument that is no tensor, in the order of the schema."""
    return {a.name: str(a.type) for a in spec.parsed.arguments if str(a.type) != "Tensor"}


def declare_fields(trt: Any, spec: OpSpec) -> Any:
    """The fields that the creator of an op takes."""
    fields = [
        trt.PluginField(name, b"", getattr(trt.PluginFieldType, _FIELDS[kind][0]))
        for name, kind in scalar_arguments(spec).items()
    ]
    return trt.PluginFieldCollection(fields)


def read_fields(spec: OpSpec, fields: Any) -> dict[str, Any]:
    """The values of a plugin's fields by name.

    Raises:
        ValueError: a field is missing, or one that the op does not have came.
    """
    kinds = scalar_arguments(spec)
    values = {field.name: field for field in fields}
    if values.keys() != kinds.keys():
        raise ValueError(f"{spec.name}: the plugin takes {', '.join(kinds) or 'no fields'}, got {', '.join(values)}")
    return {name: _read(kind, values[name]) for name, kind in kinds.items()}


def _read(kind: str, field: Any) -> Any:
    if kind == "str":
        # A string of an ONNX node ends in a zero here, and an empty one has no data.
        return bytes(field.data).rstrip(b"\0").decode() if field.data is not None else ""
    value = np.asarray(field.data).reshape(-1)[0]
    if kind == "float":
        return shortest_float(value)
    return bool(value) if kind == "bool" else int(value)


def shortest_float(value: Any) -> float:
    """The shortest decimal that rounds to a float32: 0.7 where the field says 0.699999988, as the model meant it."""
    return float(np.format_float_scientific(np.float32(value), unique=True))


def pack_values(spec: OpSpec, values: dict[str, Any]) -> list[tuple[str, Any, str]]:
    """Name, buffer and field type of each value; the buffers must outlive the fields made of them."""
    packed = []
    for name, kind in scalar_arguments(spec).items():
        field, dtype = _FIELDS[kind]
        buffer = values[name].encode() if kind == "str" else np.array([values[name]], dtype)
        packed.append((name, buffer, field))
    return packed
