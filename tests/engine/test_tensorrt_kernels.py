"""Kernels inside a plan: launches traced on unknown sizes, PTX in TensorRT's order, declarations to `tensorrt.plugin`.

Full TensorRT cannot be installed from PyPI, so the declarations meet a small stand-in for the contract of its
decorators and expressions (tensorrt_cu13_bindings 11.4.0.106, Apache-2.0).
"""

import inspect
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from planmill import kernels
from planmill.engine import DynamicDim, PlanError, capture
from planmill.engine.plugins import declared
from planmill.engine.plugins.launches import NotOneKernel, recorded, trace_launch
from planmill.engine.plugins.ptx import Kernel, order_parameters
from planmill.engine.plugins.python import DTYPES
from planmill.engine.plugins.sizes import Expression, bind, evaluate
from planmill.engine.tensorrt.kernels import check_kernels, mark_nodes
from planmill.kernels import OpSpec
from planmill.kernels.neighbors import score_mutually
from planmill.kernels.routing import score_experts

SPECS = list(kernels.ops().values())
ARITHMETIC: dict[str, Any] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
}


def inputs(spec: OpSpec) -> tuple[list[torch.Tensor], dict[str, Any]]:
    args = next(case for case in spec.cases() if case.compiled).make(torch.float32, torch.Generator().manual_seed(0))
    names = [a.name for a in spec.parsed.arguments]
    tensors = [a.contiguous() for a in args if isinstance(a, torch.Tensor)]
    return tensors, {n: a for n, a in zip(names, args, strict=True) if not isinstance(a, torch.Tensor)}


def free_dims(tensors: list[torch.Tensor]) -> list[list[int | None]]:
    """The first dimension of the first tensor is not known."""
    return [[None if i == axis == 0 and n > 1 else n for axis, n in enumerate(t.shape)] for i, t in enumerate(tensors)]


def test_a_traced_launch_is_the_launch_that_happens() -> None:
    """Every op: either it is refused with a reason, or grid and integers are those of a launch with numbers."""
    traced = []
    reasons: dict[str, str] = {}
    for spec in SPECS:
        tensors, attributes = inputs(spec)
        try:
            launch = trace_launch(spec, free_dims(tensors), [t.dtype for t in tensors], attributes)
        except NotOneKernel as error:
            reasons[spec.name] = str(error)
            continue
        with recorded() as launches:
            spec.load(str(spec.cuda))(*bind(spec, tensors, attributes))
        ((kernel, grid, args, kwargs),) = launches
        happened = dict(zip(kernel.arg_names, args, strict=False)) | kwargs

        def number(size: Any, tensors: list[torch.Tensor] = tensors) -> Any:
            if not isinstance(size, Expression):
                return size
            return evaluate(size, lambda i, axis: tensors[i].shape[axis], lambda o, a, b: ARITHMETIC[o](a, b))

        assert [number(size) for size in launch.grid] == [*grid, 1, 1][:3]
        for name, value in launch.arguments.items():
            if isinstance(value, tuple):
                assert isinstance(happened[name], torch.Tensor)
            else:
                assert number(value) == happened[name]
        traced.append(spec.name)
    assert all(reason.startswith(name) for name, reason in reasons.items())
    assert {"router_logits", "gated_linear_attention", "token_merging", "token_unmerging"} <= set(traced)
    assert len(traced) >= 12


PTX = """.version 8.7
.visible .entry k(
	.param .u64 .ptr .global .align 1 k_param_0,
	.param .u64 .ptr .global .align 1 k_param_1,
	.param .u32 k_param_2,
	.param .u64 .ptr .global .align 1 k_param_3,
	.param .u64 .ptr .global .align 1 k_param_4,
	.param .u64 .ptr .global .align 1 k_param_5
)
{
	ld.param.b64 	%rd1, [k_param_0];
	ld.param.b64 	%rd2, [k_param_3];
}
"""


def test_parameters_stand_in_the_order_of_a_plan() -> None:
    rows = Expression("dim", 0, 0)
    passed = [("output", 0), ("input", 1), rows, ("input", 1)]
    ptx, sizes = order_parameters(PTX, passed, inputs=3, outputs=1)
    declared = [line.split()[-1].rstrip(",") for line in ptx.splitlines() if ".param" in line and "ld." not in line]
    assert declared == ["unread_0", "k_param_1", "unread_2", "k_param_2", "k_param_0"]
    assert len(sizes) == 1
    assert sizes[0] is rows
    assert "[k_param_1]" in ptx  # passed twice: one parameter serves
    assert "k_param_3" not in ptx


@pytest.mark.parametrize(
    ("ptx", "passed", "message"),
    [
        (
            PTX.replace("k_param_3]", "k_param_5]"),
            [("output", 0), ("input", 0), 4, ("input", 1)],
            "reads scratch memory",
        ),
        (PTX, [("output", 0), ("input", 0)], "takes 6 parameters, and 4 were expected"),
        (PTX, [("input", 2), ("input", 0), 4, ("input", 1)], "does not write output 0"),
        (".version 8.7", [], "has no entry"),
    ],
    ids=["scratch", "count", "output", "entry"],
)
def test_ptx_that_does_not_fit_is_refused(ptx: str, passed: list[Any], message: str) -> None:
    with pytest.raises(NotOneKernel, match=message):
        order_parameters(ptx, passed, inputs=3, outputs=1)


ASSEMBLE = """
import subprocess, sys, torch
from pathlib import Path
from planmill import kernels
from planmill.engine.plugins.launches import trace_launch
from planmill.engine.plugins.ptx import compile_launch
from planmill.kernels.common.triton_checks import tool
for name, shapes in (("token_unmerging", None), ("router_logits", None)):
    spec = kernels.ops()[name]
    args = next(c for c in spec.cases() if c.compiled).make(torch.float32, torch.Generator().manual_seed(0))
    tensors = [a for a in args if isinstance(a, torch.Tensor)]
    scalars = {a.name: v for a, v in zip(spec.parsed.arguments, args) if not isinstance(v, torch.Tensor)}
    dims = [[None if i == axis == 0 else n for axis, n in enumerate(t.shape)] for i, t in enumerate(tensors)]
    types = [t.dtype for t in tensors]
    launch = trace_launch(spec, dims, types, scalars)
    kernel = compile_launch(launch, types, [dtype for _, dtype in spec.outputs(*args)], 90)
    assert ".version 8.7" in kernel.ptx, "the PTX is of a later version than a CUDA 13.0 driver takes"
    path = Path(sys.argv[1]) / (name + ".ptx")
    path.write_text(kernel.ptx)
    subprocess.run([tool("ptxas"), "-arch=sm_90a", str(path), "-o", str(path) + ".cubin"], check=True)
    print(name, kernel.threads, len(kernel.sizes))
"""


def test_the_assembler_takes_the_ptx(tmp_path: Path) -> None:
    """In a process without Triton's interpreter, in which a kernel can be compiled."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = [sys.executable, "-P", "-W", "ignore", "-c", ASSEMBLE, str(tmp_path)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["token_unmerging", "router_logits"]


class Size:
    """A stand-in for ShapeExpr and SymInt32, which compute with an expression on the left only."""

    def __init__(self, value: Any) -> None:
        self.number: int = value.number if isinstance(value, Size) else value

    def _with(self, operation: str, other: Any) -> "Size":
        return Size(ARITHMETIC[operation](self.number, other.number if isinstance(other, Size) else other))

    def __add__(self, other: Any) -> "Size":
        return self._with("+", other)

    def __sub__(self, other: Any) -> "Size":
        return self._with("-", other)

    def __mul__(self, other: Any) -> "Size":
        return self._with("*", other)

    def __floordiv__(self, other: Any) -> "Size":
        return self._with("//", other)


class Described:
    def __init__(self, sizes: Any, dtype: Any, shape: Any = ()) -> None:
        self.shape_expr, self.dtype, self.shape = sizes, dtype, shape


class Declarations:
    """A stand-in for tensorrt.plugin: the decorators keep what they are given."""

    TensorDesc, ShapeExpr, SymInt32 = Described, Size, Size
    KernelLaunchParams, SymExprs = SimpleNamespace, list

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def SymIntExprs(self, count: int) -> list[Any]:
        return [None] * count

    def from_shape_expr(self, sizes: tuple[Any, ...], dtype: Any) -> Described:
        return Described(sizes, dtype)

    def register(self, name: str) -> Any:
        return lambda function: self.kept.__setitem__(name, function)

    def aot_impl(self, name: str) -> Any:
        return lambda function: self.kept.__setitem__(f"{name} kernel", function)


TENSORRT = SimpleNamespace(DataType=SimpleNamespace(**{n: SimpleNamespace(name=n) for n in DTYPES.values()}))


def described(tensors: list[torch.Tensor]) -> list[Described]:
    dims = free_dims(tensors)
    return [
        Described(
            [Size(n) for n in t.shape],
            getattr(TENSORRT.DataType, DTYPES[t.dtype]),
            [-1 if n is None else n for n in sizes],
        )
        for t, sizes in zip(tensors, dims, strict=True)
    ]


def test_declarations_are_derived_from_every_op() -> None:
    for spec in SPECS:
        tensors, attributes = inputs(spec)
        if any(t.dtype not in DTYPES for t in tensors):
            continue
        library = Declarations()
        declared.declare_op(TENSORRT, library, spec, 90)
        describe = library.kept[f"planmill::{spec.name}"]
        made = describe(*described(tensors), **attributes)
        made = made if isinstance(made, tuple) else (made,)
        wanted = spec.outputs(*bind(spec, tensors, attributes))
        assert [[n.number for n in desc.shape_expr] for desc in made] == [list(shape) for shape, _ in wanted]
        assert [desc.dtype.name for desc in made] == [DTYPES[dtype] for _, dtype in wanted]
        names = [a.name for a in spec.parsed.arguments]
        tensors_first = [n for n in names if n not in attributes] + [n for n in names if n in attributes]
        assert list(inspect.signature(describe).parameters) == tensors_first
        implement = library.kept[f"planmill::{spec.name} kernel"]
        assert list(inspect.signature(implement).parameters) == [*tensors_first, "outputs", "tactic"]


def test_a_declared_kernel_carries_its_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = kernels.ops()["token_unmerging"]
    tensors, attributes = inputs(spec)
    monkeypatch.setattr(
        declared,
        "compile_launch",
        lambda launch, given, made, sm: Kernel(f"k{sm}", "ptx", (launch.grid[0], 7), launch.grid, 128, 4096),
    )
    library = Declarations()
    declared.declare_op(TENSORRT, library, spec, 90)
    outputs = [Described([], getattr(TENSORRT.DataType, DTYPES[d])) for _, d in spec.outputs(*tensors)]
    name, ptx, parameters, extra = library.kept["planmill::token_unmerging kernel"](
        *described(tensors), *attributes.values(), outputs, 0
    )
    with recorded() as launches:
        spec.load(str(spec.cuda))(*bind(spec, tensors, attributes))
    assert (name, ptx, parameters.block_x, parameters.shared_mem) == ("k90", "ptx", 128, 4096)
    assert parameters.grid_x.number == launches[0][1][0]
    assert [size.number for size in extra] == [launches[0][1][0], 7]


class Scored(nn.Module):
    """float32 [B, 8] -> logits [B, 3], and scores where `mutual` asks for them."""

    def __init__(self, mutual: bool) -> None:
        super().__init__()
        self.weight, self.mutual = nn.Parameter(torch.randn(3, 8)), mutual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return score_mutually(x[:, None]) if self.mutual else score_experts(x, self.weight)


def test_an_op_of_several_kernels_is_refused_by_name() -> None:
    batch = DynamicDim("batch", 2, 4, 8)
    check_kernels(capture(Scored(False).eval(), torch.randn(4, 8), dynamic=batch))
    with pytest.raises(
        PlanError, match=r"plugins aot: op planmill::mutual_score .*: build with --plugins python or none"
    ):
        check_kernels(capture(Scored(True).eval(), torch.randn(4, 8), dynamic=batch))


def test_marked_nodes_ask_for_their_kernel(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("knn", ["x", "x"], ["d", "i"], domain="planmill", k=1),
        helper.make_node("Relu", ["d"], ["y"]),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", [x], [y])), str(path))
    before = path.read_bytes()
    marked = onnx.load(str(mark_nodes(path)))
    assert [[a.name for a in node.attribute] for node in marked.graph.node] == [["k", "aot"], []]
    assert path.read_bytes() == before
