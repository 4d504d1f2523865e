"""Every op of the registry in ONNX, as a node and as standard operators. No list is kept."""

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from planmill import kernels
from planmill.engine import Captured, PlanError, capture
from planmill.engine.capture import custom_ops
from planmill.engine.manifest import DimRange, TensorSpec
from planmill.engine.onnx_export import export_onnx
from planmill.engine.onnx_ops import call_arguments, encode, schema_of
from planmill.engine.onnx_runner import OnnxRunner
from planmill.engine.plugins.fields import shortest_float
from planmill.engine.portable import _SinglePrecision, lower
from planmill.engine.targets import Options
from planmill.engine.tensorrt.loops import keep_casts_outside
from planmill.engine.tensorrt.plan import build_onnx
from planmill.engine.tensorrt.process import start_builder
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.mutual_score.portable import mean_between
from planmill.kernels.neighbors.mutual_score.reference import interval

SPECS = list(kernels.ops().values())
PORTABLE = [spec for spec in SPECS if not spec.no_portable]
FAMILIES = sorted({spec.family for spec in PORTABLE})


@functools.cache
def _arguments(name: str, dtype: torch.dtype = torch.float32) -> tuple:
    every = kernels.ops()[name].cases()
    made = (c.make(dtype, torch.Generator().manual_seed(0)) for c in every if c.compiled and dtype in c.dtypes)
    others = (c.make(dtype, torch.Generator().manual_seed(0)) for c in every if dtype in c.dtypes)
    return next(made, None) or next(args for args in others if all(x.numel() for x in tensors_of(args)[:1]))


def arguments(spec: OpSpec) -> tuple:
    """The op's first compiled case."""
    return _arguments(spec.name)


def tensors_of(args: tuple) -> list[torch.Tensor]:
    return [a for a in args if isinstance(a, torch.Tensor)]


def usable(spec: OpSpec, args: tuple) -> bool:
    """Whether a plan can have these sizes: its dimensions are at least one, but for what an op does without."""
    return all(x.shape[0] for x in tensors_of(args) if x.dim() > 1) and all(
        0 not in shape for shape, _ in spec.outputs(*args)
    )


def as_tuple(value: Any) -> tuple:
    return value if isinstance(value, tuple) else (value,)


class Calls(nn.Module):
    """Each op once, on inputs of its own."""

    def __init__(self, specs: list[OpSpec]) -> None:
        super().__init__()
        self.specs = specs

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        outputs: list[torch.Tensor] = []
        for spec in self.specs:
            args = (next(given) if isinstance(a, torch.Tensor) else a for a in arguments(spec))
            outputs += as_tuple(spec.op(*args))
        return tuple(outputs)


class OneCall(nn.Module):
    """An op on the tensors given; what is empty is its own."""

    def __init__(self, spec: OpSpec, args: tuple) -> None:
        super().__init__()
        self.spec, self.args = spec, args

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(tensors)
        args = (next(given) if isinstance(a, torch.Tensor) and a.numel() else a for a in self.args)
        return as_tuple(self.spec.op(*args))


def captured_calls(specs: list[OpSpec], *, dynamic: bool) -> Captured:
    """A program of `specs`; with `dynamic`, what has the first dimension of an op's first float tensor varies in it."""
    tensors, shapes = [], []
    for spec in specs:
        mine = tensors_of(arguments(spec))
        batch = next(x for x in mine if x.is_floating_point()).shape[0]
        shapes += [{0: torch.export.Dim.AUTO} if dynamic and x.shape[:1] == (batch,) else None for x in mine]
        tensors += mine
    program = torch.export.export(Calls(specs), tuple(tensors), dynamic_shapes=(tuple(shapes),))
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}

    def described(names: Any, letter: str) -> list[TensorSpec]:
        found = [
            (values[name].dtype, [s if isinstance(s, int) else str(s) for s in values[name].shape]) for name in names
        ]
        return [
            TensorSpec(name=f"{letter}{i}", dtype=str(dtype).removeprefix("torch."), shape=shape)
            for i, (dtype, shape) in enumerate(found)
        ]

    inputs = described(program.graph_signature.user_inputs, "x")
    outputs = described(program.graph_signature.user_outputs, "y")
    varying = {size for spec in outputs for size in spec.shape if isinstance(size, str) and size.isidentifier()}
    ranges = {name: DimRange(minimum=1, optimum=8, maximum=64) for name in varying}
    return Captured(program, nn.Identity(), inputs, outputs, ranges, tuple(tensors), [], "contiguous")


def run_onnx(path: Path, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: inputs[value.name].numpy() for value in session.get_inputs()}
    return [torch.from_numpy(numpy.array(x)) for x in session.run(None, feeds)]


def assert_parity(spec: OpSpec, args: tuple, got: tuple, want: tuple, dtype: torch.dtype = torch.float32) -> None:
    atol, rtol = spec.tolerances[dtype]
    for g, w in zip(got, want, strict=True):
        assert (g.dtype, g.shape) == (w.dtype, w.shape), spec.name
    if spec.compare is not None:
        spec.compare(args, got, want, atol, rtol)
        return
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=atol, rtol=rtol, equal_nan=True, msg=lambda m: f"{spec.name}: {m}")


@pytest.mark.parametrize(
    "family",  # one export a family; all but the smallest are slow
    [pytest.param(family, marks=[pytest.mark.slow] * (family != "moments")) for family in FAMILIES],
)
def test_lowered_to_standard_operators(family: str, tmp_path: Path) -> None:
    specs = [spec for spec in PORTABLE if spec.family == family]
    captured = captured_calls(specs, dynamic=True)
    model = export_onnx(captured, tmp_path, plugins="none")
    assert model.ops == ()
    proto = onnx.load(model.path)
    assert {node.domain for node in proto.graph.node} == {""}
    for output, value in zip(captured.outputs, proto.graph.output, strict=True):
        for size, dim in zip(output.shape, value.type.tensor_type.shape.dim, strict=True):
            assert isinstance(size, int) == bool(dim.dim_value or not dim.dim_param), (value.name, output)
    outputs = iter(run_onnx(model.path, {s.name: x for s, x in zip(captured.inputs, captured.examples, strict=True)}))
    for spec in specs:
        args = arguments(spec)
        want = as_tuple(spec.reference(*args))
        assert_parity(spec, args, tuple(next(outputs) for _ in want), want)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "dtype"),
    [
        pytest.param(spec, dtype, id=f"{spec.name}-{dtype}")
        for spec in PORTABLE
        for dtype in sorted(spec.tolerances, key=str)
    ],
)
def test_tensorrt_builds_every_op_without_plugins(spec: OpSpec, dtype: torch.dtype, tmp_path: Path) -> None:
    """Each op alone through TensorRT-RTX's builder, and under ONNX Runtime against its reference."""
    args = _arguments(spec.name, dtype)
    tensors = [x.contiguous() for x in tensors_of(args) if x.numel()]
    captured = capture(OneCall(spec, args).eval(), tensors, dynamic=None)
    with start_builder(tmp_path) as builder:
        model = export_onnx(captured, tmp_path, plugins="none")
        keep_casts_outside(model.path)
        want = as_tuple(spec.reference(*args))
        got = tuple(OnnxRunner(model.path, captured.outputs)(tensors))
        assert_parity(spec, args, got, want, dtype)
        built = build_onnx(builder, model, captured.inputs, {}, Options(plugins="none", sms=(89,)), "tensorrt_rtx")
    assert built.plugins == {}


def test_a_node_holds_the_arguments(tmp_path: Path) -> None:
    model = export_onnx(captured_calls(SPECS, dynamic=False), tmp_path, plugins="python")
    assert model.ops == tuple(sorted(f"planmill::{spec.name}" for spec in SPECS))
    onnx.checker.check_model(str(model.path), full_check=True)
    proto = onnx.load(model.path)
    types = {v.name: v.type.tensor_type for v in (*proto.graph.value_info, *proto.graph.output)}
    found = {node.op_type: node for node in proto.graph.node if node.domain == "planmill"}
    for spec in SPECS:
        args, node = arguments(spec), found[spec.name]
        tensors = tensors_of(args)
        assert len(node.input) == len(tensors)
        for got, want in zip(call_arguments(spec, node, tensors), args, strict=True):
            assert type(got) is type(want)
            if not isinstance(want, torch.Tensor):
                assert got == pytest.approx(want, rel=1e-7, abs=0) if isinstance(want, float) else got == want
        for name, (shape, dtype) in zip(node.output, spec.outputs(*args), strict=True):
            assert [dim.dim_value for dim in types[name].shape.dim] == list(shape)
            assert (
                onnx.helper.tensor_dtype_to_np_dtype(types[name].elem_type)
                == torch.empty((), dtype=dtype).numpy().dtype
            )


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_schema(spec: OpSpec) -> None:
    schema = schema_of(spec)
    assert (schema.domain, schema.name, schema.since_version) == ("planmill", spec.name, 1)
    kinds = [str(argument.type) for argument in spec.parsed.arguments]
    assert len(schema.inputs) == kinds.count("Tensor")
    assert len(schema.outputs) == len(spec.parsed.returns)
    assert set(schema.attributes) == {a.name for a in spec.parsed.arguments if str(a.type) != "Tensor"}


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec.portable], ids=lambda spec: spec.name)
def test_portable_form_agrees_with_the_reference(spec: OpSpec) -> None:
    assert spec.portable is not None
    portable = spec.load(spec.portable)
    for case in spec.cases():
        for dtype in case.dtypes:
            args = case.make(dtype, torch.Generator().manual_seed(1))
            if not usable(spec, args):
                continue
            want = as_tuple(spec.reference(*args))
            got = as_tuple(portable(*args))
            atol, rtol = spec.tolerances[dtype]
            try:
                if spec.compare is not None:
                    spec.compare(args, got, want, atol, rtol)
                else:
                    torch.testing.assert_close(got, want, atol=atol, rtol=rtol, equal_nan=True)
            except AssertionError as error:
                raise AssertionError(f"{case.id} {dtype}: {error}") from error


def test_an_empty_list_is_an_index_in_single_precision_too() -> None:
    with _SinglePrecision():
        assert torch.zeros(2, 3)[:, []].shape == (2, 0)


class Constants(nn.Module):
    """Results that do not depend on the input."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + 1, torch.full((3, 2), 2.5), torch.full((len(x), 2), 2.5)


def test_constant_results_are_written_without_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    captured = capture(Constants().eval(), torch.rand(3, 4), dynamic=None)
    model = export_onnx(captured, tmp_path, plugins="none")
    x = torch.rand(3, 4)
    for got, want in zip(OnnxRunner(model.path, captured.outputs)([x]), captured.reference(x), strict=True):
        assert torch.equal(got, want)
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []


def test_float_attributes_come_back_as_they_were_meant() -> None:
    for value in (0.7, 0.29, 0.1, 1e-5, 1e-6, 1e-20, -3.5, 0.0, 1.0, 100.0, 1e38):
        assert shortest_float(float(numpy.float32(value))) == value
    generator = torch.Generator().manual_seed(0)
    for value in torch.randn(200, generator=generator, dtype=torch.float64).tolist():
        assert shortest_float(float(numpy.float32(value))) == pytest.approx(value, rel=1e-7)
    assert encode("mix", "eps", "float", 1) == 1.0
    with pytest.raises(PlanError, match=r"op planmill::mix: eps must fit a float32, .* got 1e-50"):
        encode("mix", "eps", "float", 1e-50)


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.29, 0.7), (0.1, 0.57), (0.3, 2.0), (3.0, 9.0), (0.9, 0.2)])
def test_places_of_a_count_known_at_run_time(low: float, high: float) -> None:
    from planmill.kernels.neighbors.mutual_score import portable

    for count in (1, 2, 3, 5, 7, 10, 29, 57, 100, 200, 1000):
        n = torch.tensor(count)
        first, second = portable._place(low, n), portable._place(high, n)
        begin, end = int(torch.minimum(first, second)), int(torch.maximum(first, second))
        end = max(end, 1)
        assert (min(begin, end - 1), end) == interval(low, high, count), count
    a = torch.rand(2, 10, 3, generator=torch.Generator().manual_seed(0))
    begin, end = interval(low, high, 10)
    torch.testing.assert_close(mean_between(a, low, high, 10), a.sort(1).values[:, begin:end].mean(1))


@pytest.mark.parametrize("data", [3, 2.5, True, [], [1, 2], [1, 2.5], [[True, False]], ((0.5, 1), (2, 3))], ids=str)
def test_numbers_become_values_of_the_graph(data: Any) -> None:
    want = torch.tensor(data)
    with _SinglePrecision():
        got, wide = torch.tensor(data), torch.tensor(data, dtype=torch.float64)
    assert (got.dtype, got.shape, wide.dtype) == (want.dtype, want.shape, torch.float32)
    assert torch.equal(got, want)
    assert torch.equal(wide, want.float())


def test_a_definition_with_numbers_in_it_is_lowered() -> None:
    spec = kernels.ops()["winograd_convolution"]
    captured = captured_calls([spec], dynamic=False)
    assert not custom_ops(lower(captured, [spec]).program)


def test_an_op_without_a_portable_form_is_named() -> None:
    spec = kernels.ops()["coreset"]
    captured = captured_calls([spec], dynamic=False)
    without = replace(spec, portable=None, no_portable="a test says so")
    with pytest.raises(PlanError, match=r"op planmill::coreset has no form without plugins: a test .*python"):
        lower(captured, [without])
