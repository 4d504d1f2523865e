"""Every op of the registry, on every backend and dtype: parity, opcheck, compile, export, gradient. No list is kept."""

import contextlib
import functools
import itertools

import pytest
import torch

from planmill import kernels
from planmill.kernels.common import cpu
from planmill.kernels.common.spec import Case, OpSpec

CHECKS = ["test_schema", "test_autograd_registration", "test_faketensor"]
SPECS = list(kernels.ops().values())


def name(value: object) -> str:
    if isinstance(value, OpSpec):
        return value.name
    if isinstance(value, Case):
        return value.id
    return str(value).removeprefix("torch.")


def inputs(case: Case, dtype: torch.dtype, seed: int = 0) -> tuple:
    return case.make(dtype, torch.Generator().manual_seed(seed))


def as_tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def assert_parity(spec: OpSpec, args: tuple, got: object, want: tuple, dtype: torch.dtype) -> None:
    atol, rtol = spec.tolerances[dtype]
    if spec.compare is not None:
        spec.compare(args, as_tuple(got), want, atol, rtol)
        return
    for g, w in zip(as_tuple(got), want, strict=True):
        torch.testing.assert_close(g, w, atol=atol, rtol=rtol, equal_nan=True)


CASES = [(spec, case, dtype) for spec in SPECS for case in spec.cases() for dtype in case.dtypes]
FOUND = {(spec.name, case.id): (spec, case) for spec in SPECS for case in spec.cases()}
COMPILED = [(spec, case, dtype) for spec, case, dtype in CASES if case.compiled]
# A graph depends on the dtype only through the fake kernel, which opcheck compares for every dtype.
TRACED = [(spec, case) for spec in SPECS for case in spec.cases() if case.compiled]
GRADIENTS = [(spec, case) for spec in SPECS for case in spec.cases() if case.gradient]
ON_CPU = [
    (spec, case, dtype, level)
    for (spec, case, dtype), level in itertools.product(CASES, kernels.cpu_capabilities() or ("reference",))
]


@functools.lru_cache(maxsize=1)  # the instruction sets of a case follow one another
def made(op: str, case_id: str, dtype: torch.dtype) -> tuple[tuple, tuple]:
    spec, case = FOUND[op, case_id]
    args = inputs(case, dtype)
    return args, as_tuple(spec.reference(*args))


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(("spec", "case", "dtype", "level"), ON_CPU, ids=name)
def test_cpu_agrees_with_the_reference(spec: OpSpec, case: Case, dtype: torch.dtype, level: str) -> None:
    args, want = made(spec.name, case.id, dtype)
    with kernels.cpu_capability(level) if level != "reference" else contextlib.nullcontext():
        got = as_tuple(spec.op(*args))
    for out, (shape, kind) in zip(got, spec.outputs(*args), strict=True):
        assert tuple(out.shape) == tuple(shape)
        assert out.dtype == kind
        assert out.is_contiguous()
    assert_parity(spec, args, got, want, dtype)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_a_cpu_kernel_is_there_when_declared(spec: OpSpec) -> None:
    backend = kernels.which(spec.name, "cpu").backend
    if spec.cpu is None or cpu.extension() is None:
        assert backend == "reference"
    else:
        assert backend == f"C++ ({kernels.cpu_capabilities()[-1]})"


def for_opcheck(spec: OpSpec, case: Case, dtype: torch.dtype) -> tuple:
    return tuple(
        a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() and spec.differentiable else a
        for a in inputs(case, dtype)
    )


@pytest.mark.parametrize(("spec", "case", "dtype"), COMPILED, ids=name)
def test_opcheck(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    torch.library.opcheck(spec.op, for_opcheck(spec, case, dtype), test_utils=CHECKS)


@pytest.mark.slow  # tracing gradients with symbolic sizes: seconds each; compile and export run always
@pytest.mark.parametrize(("spec", "case"), TRACED, ids=name)
def test_opcheck_with_symbolic_sizes(spec: OpSpec, case: Case) -> None:
    args = for_opcheck(spec, case, case.dtypes[0])
    torch.library.opcheck(spec.op, args, test_utils=["test_aot_dispatch_dynamic"])


class Call(torch.nn.Module):
    """An op with its scalars fixed, as a model would hold it."""

    def __init__(self, spec: OpSpec, args: tuple) -> None:
        super().__init__()
        self.spec, self.args = spec, args

    def forward(self, *tensors: torch.Tensor) -> object:
        given = iter(tensors)
        return self.spec.op(*(next(given) if isinstance(a, torch.Tensor) else a for a in self.args))


def tensors_of(args: tuple) -> tuple:
    return tuple(a for a in args if isinstance(a, torch.Tensor))


@pytest.mark.parametrize(("spec", "case"), TRACED, ids=name)
def test_compiles_as_one_graph(spec: OpSpec, case: Case) -> None:
    dtype = case.dtypes[0]
    torch.compiler.reset()  # every case compiles the same forward, and dynamo would give up after eight of them
    args, want = made(spec.name, case.id, dtype)
    compiled = torch.compile(Call(spec, args), fullgraph=True, backend="aot_eager")
    assert_parity(spec, args, compiled(*tensors_of(args)), want, dtype)


@pytest.mark.parametrize(("spec", "case"), TRACED, ids=name)
def test_exports_with_a_dynamic_dimension(spec: OpSpec, case: Case) -> None:
    dtype = case.dtypes[0]
    args, want = made(spec.name, case.id, dtype)
    tensors = tensors_of(args)
    auto = torch.export.Dim.AUTO
    dynamic = tuple({0: auto} if t.dim() > 0 and t.is_floating_point() else None for t in tensors)
    program = torch.export.export(Call(spec, args), tensors, dynamic_shapes=(dynamic,))
    assert_parity(spec, args, program.module()(*tensors), want, dtype)
    sizes = [n.meta["val"].shape[0] for n in program.graph.nodes if n.op == "placeholder" and "val" in n.meta]
    assert any(isinstance(size, torch.SymInt) for size in sizes), "no dimension stayed dynamic"


@pytest.mark.parametrize(("spec", "case"), GRADIENTS, ids=name)
def test_gradient_is_that_of_the_reference(spec: OpSpec, case: Case) -> None:
    args = inputs(case, torch.float32)
    mine = tuple(
        a.clone().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    theirs = tuple(
        a.double().requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args
    )
    got, want = as_tuple(spec.op(*mine)), as_tuple(spec.reference(*theirs))
    weights = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)) for o in got]
    for outputs in (got, want):
        total = sum((o * w).sum() for o, w in zip(outputs, weights, strict=True) if o.is_floating_point())
        total.backward()
    for a, b in zip(mine, theirs, strict=True):
        if isinstance(a, torch.Tensor) and a.is_floating_point():
            assert a.grad is not None
            torch.testing.assert_close(a.grad.double(), b.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_no_gradient_costs_no_graph(spec: OpSpec) -> None:
    case = next(c for c in spec.cases() if c.compiled)
    for out in as_tuple(spec.op(*inputs(case, torch.float32))):
        assert not out.requires_grad


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_same_input_gives_the_same_bits(spec: OpSpec) -> None:
    for case in spec.cases():
        first, second = (as_tuple(spec.op(*inputs(case, torch.float32))) for _ in range(2))
        for a, b in zip(first, second, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num())


@pytest.mark.parametrize("spec", SPECS, ids=name)
def test_a_declaration_is_complete(spec: OpSpec) -> None:
    assert spec.cases(), "an op without cases is not tested"
    ids = [case.id for case in spec.cases()]
    assert len(set(ids)) == len(ids)
    assert any(case.compiled for case in spec.cases())
    kinds = {str(argument.type) for argument in spec.parsed.arguments}
    assert kinds <= {"Tensor", "int", "float", "bool", "str"}
    family = getattr(kernels, spec.family)
    public = [getattr(family, n) for n in family.__all__]
    folder = [f for f in public if getattr(f, "__module__", "") == f"{spec.package}.op"]
    assert folder, "an op has a public function in its op.py"
    for function in folder:
        for part in ("Args:", "Returns:", "Raises:", "Source:"):
            assert part in function.__doc__, f"{function.__name__}: docstring lacks {part}"
