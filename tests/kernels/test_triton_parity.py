"""Every Triton launcher against the float64 reference, on the shared cases; new ops are found through the registry.

Without a GPU the kernels run in Triton's interpreter, through the same launcher; CUDA C++ that a launcher calls runs on
the host, compiled from the source that ships. With `--device cuda` the tests marked
gpu run the same cases on the device, in every dtype, and twice, for equal bits.
"""

import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import planmill.kernels as kernels
from planmill.kernels import Case, OpSpec

SPECS = [spec for spec in kernels.ops().values() if (spec.cuda or "").startswith("_triton")]
CASES = [(spec, case) for spec in SPECS for case in spec.cases()]
SCREENED = 2e-3  # of the vectors' spread, where a caller asks for exact=False


def interpreted_dtypes(case: Case, index: int) -> tuple[torch.dtype, ...]:
    """float32, and in every third case a half dtype, taking turns: all three would only repeat the loads."""
    turn = index // 3 % 2
    return (*case.dtypes[:1], *(case.dtypes[1:][turn : turn + 1] if index % 3 == 0 or "mean" in case.id else ()))


def in_every_run(case: Case, dtype: torch.dtype) -> bool:
    """All take minutes: each run has what tiles, NaN and gradients bring, `make test-all` the rest."""
    return dtype == torch.float32 and (case.compiled or case.gradient or "nan" in case.id or "across" in case.id)


def combinations() -> list[Any]:
    return [
        pytest.param(
            spec,
            case,
            dtype,
            id=f"{spec.name}-{case.id}-{str(dtype)[6:]}",
            marks=[] if in_every_run(case, dtype) else [pytest.mark.slow],
        )
        for index, (spec, case) in enumerate(CASES)
        for dtype in interpreted_dtypes(case, index)
    ]


@pytest.fixture(scope="module")
def interpreter(module_patch: pytest.MonkeyPatch) -> None:
    """Make the interpreter bearable: products through BLAS, the language patched once per launch, large row blocks.

    Tiles of products keep their rows; other blocks grow: the interpreter pays per operation, not per value.
    """
    from triton.runtime import interpreter as triton_interpreter

    def widened(x: Any) -> Any:  # the interpreter holds bfloat16 as the bits of it
        if x.dtype.scalar.is_bf16():
            return (x.data.astype(np.uint32) << 16).view(np.float32)
        return x.data.astype(np.float32)

    def dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        product = np.matmul(widened(a), widened(b)) + d.data
        return triton_interpreter.TensorHandle(product, d.dtype.scalar)

    patched: set[int] = set()
    launch = triton_interpreter.GridExecutor.__call__

    def launch_once(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        return launch(self, *args, **kwargs)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if id(self.fn.__globals__) not in patched:
            patched.add(id(self.fn.__globals__))
            triton_interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    module_patch.setattr(triton_interpreter.InterpreterBuilder, "create_dot", dot)
    module_patch.setattr(triton_interpreter.GridExecutor, "__call__", launch_once)
    module_patch.setattr(triton_interpreter.InterpretedFunction, "__call__", call)
    sizes = {"BLOCK_R": 64, "BLOCK_C": 512, "SETTLE_ROWS": 128, "SETTLE_C": 512, "SETTLE_Q": 128, "BLOCK_Q": 128,
             "BLOCK_N": 128, "CHUNKS": 4, "STATS_P": 16, "SOLVE_THREADS": 32, "PRODUCT": 256}  # fmt: skip
    from planmill.kernels.common.triton_screen import BLOCK_K

    for split in BLOCK_K:
        module_patch.setitem(BLOCK_K, split, 256)
    for module in launcher_modules():
        for name, size in sizes.items():
            if hasattr(module, name):
                module_patch.setattr(module, name, size)


@pytest.fixture(scope="module")
def module_patch() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def launcher_modules() -> list[ModuleType]:
    """The `_triton` modules and what they share."""
    for spec in SPECS:
        spec.load(str(spec.cuda))
    names = [n for n in sys.modules if n.startswith("planmill.kernels.") and "triton" in n.rpartition(".")[2]]
    return [sys.modules[name] for name in names]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every buffer a launcher allocates starts as NaN or -7: what no kernel writes is seen."""
    empty, empty_like = torch.empty, torch.empty_like

    def fill(x: torch.Tensor) -> torch.Tensor:
        return x.fill_(torch.nan if x.is_floating_point() else -7)

    monkeypatch.setattr(torch, "empty", lambda *a, **k: fill(empty(*a, **k)))
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: fill(empty_like(*a, **k)))


def as_tuple(x: Any) -> tuple:
    return x if isinstance(x, tuple) else (x,)


def compare(spec: OpSpec, dtype: torch.dtype, args: tuple, got: tuple, want: tuple, interpreted: bool) -> None:
    """By the op's own comparison where it has one; element-wise otherwise."""
    names = [argument.name for argument in spec.parsed.arguments]
    exact = "exact" not in names or args[names.index("exact")]
    atol, rtol = spec.tolerances[dtype] if exact else (SCREENED, SCREENED)
    if interpreted and got[0].dtype == torch.bfloat16:
        atol, rtol = (
            max(atol, 2.0**-8),
            max(rtol, 2.0**-7),
        )  # the interpreter truncates float32 to bfloat16 (triton 3.9); the hardware rounds
    if spec.compare is not None:
        spec.compare(args, got, want, atol, rtol)
        return
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=atol, rtol=rtol, equal_nan=True)


def check_outputs(spec: OpSpec, args: tuple, got: tuple) -> None:
    """Shapes, dtypes and strides are those of the declaration."""
    for out, (shape, dtype) in zip(got, spec.outputs(*args), strict=True):
        assert out.shape == torch.Size(shape)
        assert out.dtype == dtype
        assert out.is_contiguous()


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels were compiled for the device: run with --device cuda"
)
@pytest.mark.usefixtures("interpreter", "cuda_on_the_host", "poisoned")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("spec", "case", "dtype"), combinations())
def test_interpreted(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    args = case.make(dtype, torch.Generator().manual_seed(0))
    got = as_tuple(spec.load(str(spec.cuda))(*args))
    check_outputs(spec, args, got)
    compare(spec, dtype, args, got, as_tuple(spec.reference(*args)), interpreted=True)


def crowded(metric: str) -> tuple:
    """Three distinct rows, 700 of them: far more ties than a query has slots for candidates."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 20, generator=generator)[torch.randint(0, 3, (700,), generator=generator)]
    return rows[:9], rows, 5, metric, False, True


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="the kernels were compiled for the device: run with --device cuda"
)
@pytest.mark.usefixtures("interpreter", "poisoned")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("metric", ["l2", "cosine", "dot"])
def test_more_ties_than_slots(metric: str) -> None:
    spec, args = kernels.ops()["knn"], crowded(metric)
    distances, indices = spec.load(str(spec.cuda))(*args)
    want, lowest = spec.reference(*args)
    torch.testing.assert_close(distances, want, atol=1e-5, rtol=1e-5)
    if metric == "l2":  # equal rows are exactly equal: the lowest indices, in order
        torch.testing.assert_close(indices, lowest)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("spec", "case", "dtype"),
    [pytest.param(s, c, t, id=f"{s.name}-{c.id}-{str(t)[6:]}") for s, c in CASES for t in c.dtypes],
)
def test_on_device(spec: OpSpec, case: Case, dtype: torch.dtype) -> None:
    args = case.make(dtype, torch.Generator().manual_seed(0))
    moved = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)
    first, second = as_tuple(spec.op(*moved)), as_tuple(spec.op(*moved))
    check_outputs(spec, args, first)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, equal_nan=True)
    got = tuple(x.cpu() for x in first)
    compare(spec, dtype, args, got, as_tuple(spec.reference(*args)), interpreted=False)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", [pytest.param(s, id=s.name) for s in SPECS])
def test_captured_in_a_graph(spec: OpSpec) -> None:
    case = next(c for c in spec.cases() if c.id in ("odd", "window_3", "exclude_self"))
    args = case.make(case.dtypes[0], torch.Generator().manual_seed(0))
    moved = tuple(a.cuda() if isinstance(a, torch.Tensor) else a for a in args)
    want = as_tuple(spec.op(*moved))  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = as_tuple(spec.op(*moved))
    graph.replay()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
