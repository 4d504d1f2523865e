"""Every op of the registry as a TensorRT plugin: shapes, fields, calls, and one real build that holds them all.

No list is kept: a new op is found through the registry. The builder needs no GPU; what it builds is not run here.
"""

from collections.abc import Iterator, Sequence
from enum import Enum
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from planmill import kernels
from planmill.engine.plugins import PLUGIN_VERSION
from planmill.engine.plugins.fields import pack_values, read_fields, scalar_arguments, shortest_float
from planmill.engine.plugins.python import DTYPES, OpPlugin
from planmill.engine.plugins.sizes import evaluate, trace_outputs
from planmill.engine.tensorrt.builder import Job
from planmill.engine.tensorrt.head import read_head
from planmill.engine.tensorrt.process import start_builder
from planmill.kernels import OpSpec


def compiled_inputs(spec: OpSpec) -> tuple:
    case = next(case for case in spec.cases() if case.compiled)
    return case.make(torch.float32, torch.Generator().manual_seed(0))


def fits(spec: OpSpec) -> bool:
    """Whether TensorRT has the dtypes of the op's tensors; for the others see test_tensorrt.py."""
    return all(a.dtype in DTYPES for a in compiled_inputs(spec) if isinstance(a, torch.Tensor))


SPECS = [spec for spec in kernels.ops().values() if fits(spec)]
ARITHMETIC = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
}
ELEMENTS = {
    torch.float32: TensorProto.FLOAT,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}


def op_name(spec: OpSpec) -> str:
    return spec.name


def as_tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def split(spec: OpSpec, args: tuple) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """An op's tensors, and its other arguments by name."""
    names = [a.name for a in spec.parsed.arguments]
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    return tensors, {n: a for n, a in zip(names, args, strict=True) if not isinstance(a, torch.Tensor)}


def drawn(spec: OpSpec, dtype: torch.dtype = torch.float32) -> Iterator[tuple]:
    for case in spec.cases():
        if dtype in case.dtypes:
            yield case.make(dtype, torch.Generator().manual_seed(0))


class Dimension:
    """A dimension of a stand-in for the library's expression builder: unknown, with the number that it will be."""

    def __init__(self, number: int, known: bool) -> None:
        self.number, self.known = number, known

    def is_constant(self) -> bool:
        return self.known

    def get_constant_value(self) -> int:
        return self.number


class ExpressionBuilder:
    def constant(self, number: int) -> Dimension:
        return Dimension(number, True)

    def operation(self, kind: Enum, a: Dimension, b: Dimension) -> Dimension:
        return Dimension(ARITHMETIC[kind.value](a.number, b.number), a.known and b.known)


LIBRARY = SimpleNamespace(
    DimensionOperation=Enum("DimensionOperation", {"SUM": "+", "SUB": "-", "PROD": "*", "FLOOR_DIV": "//"}),
    DataType=Enum("DataType", {name: name for name in DTYPES.values()}),
    TensorFormat=Enum("TensorFormat", {"LINEAR": 0, "CHW32": 1}),
    DimsExprs=list,
    PluginFieldType=Enum("PluginFieldType", {name: name for name in ("INT64", "FLOAT32", "CHAR")}),
)


def describe(tensors: Sequence[torch.Tensor]) -> list[SimpleNamespace]:
    return [
        SimpleNamespace(dims=tuple(t.shape), type=LIBRARY.DataType[DTYPES[t.dtype]], format=LIBRARY.TensorFormat.LINEAR)
        for t in tensors
    ]


@pytest.mark.parametrize("spec", SPECS, ids=op_name)
def test_shapes_and_fields_are_those_of_the_declaration(spec: OpSpec) -> None:
    for args in drawn(spec):
        tensors, attributes = split(spec, args)
        plugin = OpPlugin(LIBRARY, spec, attributes)
        wanted = spec.outputs(*args)
        for known in (False, True):
            inputs = [[Dimension(n, known) for n in t.shape] for t in tensors]
            shapes = plugin.get_output_shapes(inputs, [], ExpressionBuilder())
            assert [[d.number for d in shape] for shape in shapes] == [list(shape) for shape, _ in wanted]
        types = plugin.get_output_data_types([LIBRARY.DataType[DTYPES[t.dtype]] for t in tensors])
        assert [t.name for t in types] == [DTYPES[dtype] for _, dtype in wanted]
        assert_fields_carry(spec, attributes)


def assert_fields_carry(spec: OpSpec, attributes: dict[str, Any]) -> None:
    fields = [
        SimpleNamespace(name=n, data=np.frombuffer(bytes(memoryview(buffer)), np.int8) if kind == "CHAR" else buffer)
        for n, buffer, kind in pack_values(spec, attributes)
    ]
    read = read_fields(spec, fields)
    for name, kind in scalar_arguments(spec).items():
        if kind == "float":
            assert np.float32(read[name]) == np.float32(attributes[name])
        else:
            assert (type(read[name]), read[name]) == (type(attributes[name]), attributes[name])


@pytest.mark.parametrize("spec", SPECS, ids=op_name)
def test_a_call_computes_on_the_memory_it_is_given(spec: OpSpec) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        args = next((a for a in drawn(spec, dtype) if all(0 not in shape for shape, _ in spec.outputs(*a))), None)
        if args is None:
            continue
        tensors, attributes = split(spec, args)
        tensors = [t.contiguous() for t in tensors]
        wanted = as_tuple(spec.op(*args))
        got = [torch.full_like(w, -7 if not w.is_floating_point() else torch.nan) for w in wanted]
        plugin = OpPlugin(LIBRARY, spec, attributes)
        plugin.device = torch.device("cpu")
        pointers = [t.data_ptr() for t in tensors], [t.data_ptr() for t in got]
        plugin.enqueue(describe(tensors), describe(got), *pointers, 0, 0)
        for g, w in zip(got, wanted, strict=True):
            torch.testing.assert_close(g, w, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("spec", SPECS, ids=op_name)
def test_formats_are_linear_and_dtypes_those_of_the_op(spec: OpSpec) -> None:
    args = next(drawn(spec))
    tensors, attributes = split(spec, args)
    outputs = [torch.empty(shape, dtype=dtype) for shape, dtype in spec.outputs(*args)]
    plugin = OpPlugin(LIBRARY, spec, attributes)
    described = [SimpleNamespace(desc=d) for d in describe([*tensors, *outputs])]
    for position, d in enumerate(described):
        assert plugin.supports_format_combination(position, described, len(tensors))
        d.desc.format = LIBRARY.TensorFormat.CHW32
        assert not plugin.supports_format_combination(position, described, len(tensors))
        d.desc.format = LIBRARY.TensorFormat.LINEAR
    described[len(tensors)].desc.type = LIBRARY.DataType.BOOL
    assert not plugin.supports_format_combination(len(tensors), described, len(tensors))


def test_floats_survive_single_precision() -> None:
    for value in (0.7, 1e-6, 1 / 3, -2.5, 0.0, float("inf"), 3e38):
        assert shortest_float(np.float32(value)) == pytest.approx(value, rel=6e-8)
    assert shortest_float(np.float32(0.7)) == 0.7


def test_missing_and_unknown_fields_are_refused() -> None:
    spec = kernels.ops()["knn"]
    with pytest.raises(ValueError, match="knn: the plugin takes k, metric, exclude_self, exact, got k"):
        read_fields(spec, [SimpleNamespace(name="k", data=np.array([1]))])


@pytest.mark.parametrize(
    ("rule", "what"),
    [
        (lambda x: [((x.shape[0] % 2,), x.dtype)], "and nothing else"),
        (lambda x: [((x.shape[0] if x.shape[0] > 1 else 1,), x.dtype)], "and nothing else"),
        (lambda x: [((max(x.shape[0], 1),), x.dtype)], "and nothing else"),
        (lambda x: [((int(x.shape[0]),), x.dtype)], "and nothing else"),
        (lambda x: [((x.shape[0] * 1.5,), x.dtype)], "not with float"),
    ],
    ids=["remainder", "branch", "max", "int", "float"],
)
def test_a_shape_rule_that_does_more_is_refused(rule: Any, what: str) -> None:
    spec = OpSpec("shady(Tensor x) -> Tensor", rule, lambda x: x, list, no_kernel="a test")
    with pytest.raises(TypeError, match=f"shady: .*{what}"):
        trace_outputs(spec, [(None, 3)], [torch.float32], {})


@pytest.mark.parametrize("sizes", [(1, 1), (5, 3), (64, 9)], ids=str)
def test_expressions_compute_like_numbers(sizes: tuple[int, int]) -> None:
    def rule(x: torch.Tensor) -> Any:
        rows, columns = x.shape
        return [((2 * rows + 3 - columns // 2, 7 - rows, 9 // columns, 0 * rows), x.dtype)]

    spec = OpSpec("odd(Tensor x) -> Tensor", rule, lambda x: x, list, no_kernel="a test")
    ((shape, _),) = trace_outputs(spec, [(None, None)], [torch.float32], {})
    numbers = [evaluate(size, lambda i, axis: sizes[axis], lambda o, a, b: ARITHMETIC[o](a, b)) for size in shape]
    assert numbers == [2 * sizes[0] + 3 - sizes[1] // 2, 7 - sizes[0], 9 // sizes[1], 0]


def network(path: Path) -> dict[str, list[list[int]]]:
    """Write an ONNX file that holds every op once, its first dimension dynamic where it may be; give its profile."""
    nodes, inputs, outputs, constants, profile = [], [], [], [], {}
    for spec in SPECS:
        args = compiled_inputs(spec)
        tensors, attributes = split(spec, args)
        names = [f"{spec.name}_{a.name}" for a in spec.parsed.arguments if str(a.type) == "Tensor"]
        for index, (name, x) in enumerate(zip(names, tensors, strict=True)):
            if not x.is_floating_point() or not x.numel():
                constants.append(numpy_helper.from_array(x.contiguous().numpy(), name))
                continue
            free = index == 0 and x.shape[0] > 1
            shape = ["rows_" + name, *x.shape[1:]] if free else list(x.shape)
            inputs.append(helper.make_tensor_value_info(name, ELEMENTS[x.dtype], shape))
            if free:
                profile[name] = [list(x.shape)] * 3
        made = [f"{spec.name}_output_{i}" for i in range(len(spec.parsed.returns))]
        plain: dict[str, Any] = {n: int(v) if isinstance(v, bool) else v for n, v in attributes.items()}
        nodes.append(helper.make_node(spec.name, names, made, domain="planmill", **plain))
        outputs += [
            helper.make_tensor_value_info(name, ELEMENTS[dtype], None)
            for name, (shape, dtype) in zip(made, spec.outputs(*args), strict=True)
            if 0 not in shape
        ]
    graph = helper.make_graph(nodes, "every_op", inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("planmill", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), str(path))
    return profile


def test_every_op_builds_into_one_plan(tmp_path: Path) -> None:
    profile = network(tmp_path / "every_op.onnx")
    names = [spec.name for spec in SPECS]
    with start_builder(tmp_path) as builder:
        report = builder.build(
            Job(
                library="tensorrt_rtx",
                onnx=str(tmp_path / "every_op.onnx"),
                plan=str(tmp_path / "plan"),
                report=str(tmp_path / "report.json"),
                sms=[80, 120],
                profile=profile,
                plugins=names,
            )
        )
    assert report.plugins == dict.fromkeys(names, PLUGIN_VERSION)
    assert report.layers["plugin_v3"] == len(names)
    assert read_head(tmp_path / "plan").sms == (80, 120)
    plan = (tmp_path / "plan").read_bytes()
    for spec in SPECS:  # the plan says whom to ask for when it is loaded, and with what
        assert spec.name.encode() in plan
        for field in scalar_arguments(spec):
            assert field.encode() in plan
