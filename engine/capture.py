"""From nn.Module + example inputs + dynamic dims to a torch.export program."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch._subclasses.fake_tensor import UnsupportedOperatorException
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode
from torch.utils import _pytree as pytree

from planmill.engine.errors import PlanError, first_line
from planmill.engine.layout import Layout, suitable_layout
from planmill.engine.manifest import DimRange, Precision, TensorSpec

Examples = torch.Tensor | Sequence[torch.Tensor] | Mapping[str, torch.Tensor]

# What a user's model may raise on the wrong input; its own message is what helps.
MODEL_ERRORS = (RuntimeError, TypeError, ValueError, IndexError, KeyError, AttributeError, AssertionError)
_HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_IN_TRAINING = ("training", "train", "use_input_stats")  # arguments of normalizations that then write their statistics


@dataclass(frozen=True)
class DynamicDim:
    """A dimension that may change from call to call; the same name on two inputs means the same size.

    Args:
        name: a Python identifier.
        minimum: smallest size, at least 1.
        optimum: the size to tune for.
        maximum: largest size.

    Raises:
        PlanError: not 1 <= minimum <= optimum <= maximum, or no identifier.
    """

    name: str
    minimum: int = 1
    optimum: int = 8
    maximum: int = 64

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise PlanError(f"dynamic dimension: name must be an identifier, got {self.name!r}")
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise PlanError(
                f"dynamic dimension {self.name}: sizes must satisfy 1 <= min <= opt <= max, "
                f"got {self.minimum}:{self.optimum}:{self.maximum}"
            )

    @property
    def range(self) -> DimRange:
        """The sizes, as the manifest keeps them."""
        return DimRange(minimum=self.minimum, optimum=self.optimum, maximum=self.maximum)


BATCH = DynamicDim("batch")
Dynamic = DynamicDim | Mapping[str, Mapping[int, DynamicDim]] | None


@dataclass(frozen=True)
class Captured:
    """A model as a graph.

    Args:
        program: takes the inputs one after another, returns a tuple of tensors.
        reference: the model as it was given, called the same way: what the plan must agree with.
        inputs: name, dtype and shape of each input.
        outputs: name, dtype and shape of each output.
        dynamic: sizes of each dynamic dimension.
        examples: the inputs that it was captured with, contiguous, at the optimal sizes.
        ops: custom ops in the graph, "namespace::name".
        layout: "channels_last" where convolutions do most of the arithmetic.
        rewrites: the passes of planmill.engine.rewrites that changed the program since.
    """

    program: ExportedProgram
    reference: torch.nn.Module
    inputs: list[TensorSpec]
    outputs: list[TensorSpec]
    dynamic: dict[str, DimRange]
    examples: tuple[torch.Tensor, ...]
    ops: list[str]
    layout: Layout
    rewrites: list[str] = field(default_factory=list)


class Boundary(torch.nn.Module):
    """A model called with tensors one after another, giving a flat tuple of tensors.

    With `compute`, float32 inputs are cast to it before the model and floating outputs back to `dtypes` after it: the
    boundary of a bf16 plan is that of the float32 model.
    """

    def __init__(self, model: torch.nn.Module, names: Sequence[str] | None, compute: torch.dtype | None = None) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.compute = compute
        self.dtypes: list[torch.dtype] = []

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Call the model; see the class."""
        if self.compute is not None:
            inputs = tuple(x.to(self.compute) if x.dtype == torch.float32 else x for x in inputs)
        called = self.model(*inputs) if self.names is None else self.model(**dict(zip(self.names, inputs, strict=True)))
        outputs = [leaf for leaf in pytree.tree_leaves(called) if leaf is not None]
        if self.compute is not None:
            outputs = [x.to(d) if x.is_floating_point() else x for x, d in zip(outputs, self.dtypes, strict=True)]
        return tuple(outputs)


def capture(
    model: torch.nn.Module,
    example_inputs: Examples,
    *,
    dynamic: Dynamic = BATCH,
    precision: Precision = "fp32",
    output_names: Sequence[str] | None = None,
) -> Captured:
    """Turn a model into a torch.export program.

    Args:
        model: in eval mode, on the CPU; it is not changed.
        example_inputs: one tensor, tensors in the order of `forward`, or tensors by argument name; any strides.
        dynamic: a DynamicDim for dimension 0 of every input, {input: {dimension: DynamicDim}}, or None: all fixed.
        precision: "fp32" keeps the model's dtypes; "bf16" and "fp16" cast its parameters, its buffers and float32
            inputs to bfloat16 or float16 inside the program and its floating outputs back.
        output_names: instead of the names found: dictionary keys or attribute names, else output, output_0, ...

    Raises:
        PlanError: the model is in training mode, does not run on the examples, fixes a dynamic dimension, changes its
            own state, returns something else than tensors, or holds an op that torch.export does not know.
    """
    if precision not in ("fp32", *_HALVES):
        raise PlanError(f"precision must be fp32, bf16 or fp16, got {precision!r}")
    if model.training:
        raise PlanError("the model is in training mode, and a plan is for inference: call model.eval() first")
    names, tensors = _named(model, example_inputs)
    dims = _dims(names, tensors, dynamic)
    keywords = names if isinstance(example_inputs, Mapping) else None
    examples = tuple(
        resized(tensor, {dim: max(d.optimum, 2) for dim, d in dims[name].items()})
        for name, tensor in zip(names, tensors, strict=True)
    )
    reference = Boundary(model, keywords).eval()
    found, dtypes = _run_once(model, keywords, examples)
    boundary = reference
    if (half := _HALVES.get(precision)) is not None:
        boundary = Boundary(copy.deepcopy(model).to(half), keywords, half).eval()
        boundary.dtypes = dtypes
        smallest = [  # arithmetic in halves is slow on a CPU
            resized(x, {dim: d.minimum for dim, d in dims[name].items()})
            for name, x in zip(names, examples, strict=True)
        ]
        _must_run(boundary, smallest, f"in {str(half).removeprefix('torch.')} on the example inputs")
    program = _export(boundary, examples, names, dims)
    _must_be_pure(program)
    if output_names is not None and len(output_names) != len(found):
        raise PlanError(f"output_names: the model has {len(found)} outputs, got {len(output_names)} names")
    inputs, outputs = _specs(program, names, list(output_names or found), dims)
    ranges = {d.name: d.range for by_dim in dims.values() for d in by_dim.values()}
    layout = suitable_layout(program)
    return Captured(program, reference, inputs, outputs, ranges, examples, custom_ops(program), layout)


def _named(model: torch.nn.Module, examples: Examples) -> tuple[list[str], list[torch.Tensor]]:
    """The inputs' names, from the mapping or from the signature of `forward`, and the inputs."""
    values: list[Any]
    if isinstance(examples, Mapping):
        names, values = list(examples), list(examples.values())
    else:
        values = [examples] if isinstance(examples, torch.Tensor) else list(examples)
        names = []
        for parameter in inspect.signature(model.forward).parameters.values():
            if parameter.kind not in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                break
            names.append(parameter.name)
        names = names[: len(values)] + [f"input_{index}" for index in range(len(names), len(values))]
    if not values:
        raise PlanError("example_inputs is empty: a plan needs at least one input")
    for name, value in zip(names, values, strict=True):
        if not isinstance(value, torch.Tensor):
            raise PlanError(f"input {name}: must be a torch.Tensor, got {type(value).__name__}")
        if value.device.type != "cpu":
            raise PlanError(f"input {name}: must be on the CPU, got {value.device}")
    return names, [value.detach() for value in values]


def _dims(names: list[str], tensors: list[torch.Tensor], dynamic: Dynamic) -> dict[str, dict[int, DynamicDim]]:
    """The dynamic dimensions of each input; a dimension of one size is no dynamic one."""
    if dynamic is None:
        return {name: {} for name in names}
    if isinstance(dynamic, DynamicDim):
        sizes = {name: x.shape[0] for name, x in zip(names, tensors, strict=True) if x.dim()}
        if len(set(sizes.values())) > 1:
            listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise PlanError(
                f"the inputs disagree on dimension 0 ({listed}): say which dimensions change, with dynamic="
            )
        dynamic = {name: {0: dynamic} for name in sizes}
    ranks = {name: x.dim() for name, x in zip(names, tensors, strict=True)}
    seen: dict[str, DynamicDim] = {}
    for name, by_dim in dynamic.items():
        if name not in ranks:
            raise PlanError(f"dynamic: no input named {name!r}; there are {', '.join(names)}")
        for dim, d in by_dim.items():
            if not 0 <= dim < ranks[name]:
                raise PlanError(f"dynamic: input {name} has dimensions 0 to {ranks[name] - 1}, got {dim}")
            if seen.setdefault(d.name, d) != d:
                raise PlanError(f"dynamic: {d.name} is given two ranges")
    return {n: {i: d for i, d in dynamic.get(n, {}).items() if d.maximum > d.minimum} for n in names}


def resized(x: torch.Tensor, sizes: Mapping[int, int]) -> torch.Tensor:
    """`x` with each dimension of `sizes` cut to that size or repeated up to it; contiguous."""
    for dim, size in sizes.items():
        if x.shape[dim] == 0:
            raise PlanError(f"an example input has size 0 in dimension {dim}: give at least one element")
        x = x.index_select(dim, torch.arange(size) % x.shape[dim])
    return x.contiguous()


def _must_run(model: torch.nn.Module, examples: Sequence[torch.Tensor], how: str) -> Any:
    try:
        with torch.no_grad():
            return model(*examples)
    except MODEL_ERRORS as error:
        raise PlanError(f"the model does not run {how}: {type(error).__name__}: {first_line(error)}") from error


def _run_once(
    model: torch.nn.Module, keywords: list[str] | None, examples: tuple[torch.Tensor, ...]
) -> tuple[list[str], list[torch.dtype]]:
    """Run the model as it is: names and dtypes of its outputs."""

    class Structured(Boundary):
        def forward(self, *inputs: torch.Tensor) -> Any:
            return model(*inputs) if keywords is None else model(**dict(zip(keywords, inputs, strict=True)))

    called = _must_run(Structured(model, keywords), examples, "on the example inputs")
    names, dtypes = [], []
    for path, leaf in pytree.tree_leaves_with_path(called):
        if leaf is None:
            continue
        name = ".".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path)
        if not isinstance(leaf, torch.Tensor):
            raise PlanError(f"output {name or '0'}: must be a tensor, got {type(leaf).__name__}: return tensors only")
        names.append(f"output_{name}" if name.isdecimal() else name or "output")
        dtypes.append(leaf.dtype)
    if not names:
        raise PlanError("the model returns no tensor")
    return names, dtypes


def _export(
    boundary: Boundary,
    examples: tuple[torch.Tensor, ...],
    names: list[str],
    dims: dict[str, dict[int, DynamicDim]],
) -> ExportedProgram:
    symbols = {d.name: Dim(d.name, min=d.minimum, max=d.maximum) for by in dims.values() for d in by.values()}
    shapes = tuple({dim: symbols[d.name] for dim, d in dims[name].items()} for name in names)
    from torch._dynamo.exc import UserError  # loads the compiler: seconds that reading a plan need not spend

    try:
        with torch.no_grad():
            return torch.export.export(boundary, examples, dynamic_shapes=(shapes,), strict=False)
    except (UserError, ConstraintViolationError) as error:
        fixed = [name for name in symbols if name in str(error)]
        if not fixed:
            raise PlanError(f"the model cannot be captured: {first_line(error)}") from error
        raise PlanError(
            f"the model fixes {' and '.join(fixed)} to a size, or ties it to another, so it cannot be dynamic "
            f"({_reason(error)}): compute with x.shape[...] instead of a number taken from it, narrow the range, or "
            "fix all sizes (dynamic=None, --static)"
        ) from error
    except UnsupportedOperatorException as error:
        raise PlanError(
            f"op {error.func} cannot be captured: it says nothing about the shape of its result: register a fake "
            "with torch.library.register_fake"
        ) from error
    except GuardOnDataDependentSymNode as error:
        raise PlanError(
            f"the model cannot be captured: a branch or a size depends on the values of a tensor "
            f"({first_line(error)}): use torch.where, torch.cond or torch._check"
        ) from error
    except (RuntimeError, ValueError) as error:
        raise PlanError(f"the model cannot be captured: {type(error).__name__}: {first_line(error)}") from error


def _reason(error: BaseException) -> str:
    lines = [line.strip(" -") for line in str(error).splitlines()]
    return next((line for line in lines if "specializ" in line or "must be" in line), first_line(error)).rstrip(".")


@contextlib.contextmanager
def quiet_copies() -> Iterator[None]:
    """torch 2.13 warns of its own use of LeafSpec whenever it copies a program."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        yield


def may_write(node: torch.fx.Node) -> bool:
    """Whether an op writes into a tensor that it is given, or may: in training some do so and do not say it."""
    schema = getattr(node.target, "_schema", None)
    if schema is None or node.target is torch.ops.aten.detach_.default:
        return False
    given = dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    return schema.is_mutable or any(given.get(name) for name in _IN_TRAINING)


def _must_be_pure(program: ExportedProgram) -> None:
    """Writes show in the signature of the functional form only, which costs as much as a capture."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    if not any(may_write(node) for graph in graphs for node in graph.nodes):
        return
    with quiet_copies():
        signature = program.run_decompositions({}).graph_signature
    if signature.buffers_to_mutate:
        names = ", ".join(sorted(name.removeprefix("model.") for name in signature.buffers_to_mutate.values()))
        raise PlanError(f"the model changes its own state while it runs ({names}), and a plan has none")
    if signature.user_inputs_to_mutate:
        raise PlanError("the model writes into its inputs: work on a copy (x = x.clone())")


def _specs(
    program: ExportedProgram, names: list[str], output_names: list[str], dims: dict[str, dict[int, DynamicDim]]
) -> tuple[list[TensorSpec], list[TensorSpec]]:
    values = {node.name: node.meta["val"] for node in program.graph.nodes if "val" in node.meta}
    inputs = [values[name] for name in program.graph_signature.user_inputs if isinstance(name, str)]
    symbols = {
        value.shape[dim].node.expr: sympy.Symbol(d.name)
        for name, value in zip(names, inputs, strict=True)
        for dim, d in dims[name].items()
    }

    def spec(name: str, value: torch.Tensor) -> TensorSpec:
        shape: list[int | str] = [
            str(size.node.expr.xreplace(symbols)) if isinstance(size, torch.SymInt) else int(size)
            for size in value.shape
        ]
        shape = [int(size) if isinstance(size, str) and size.isdecimal() else size for size in shape]
        return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=shape)

    outputs = [values[name] for name in program.graph_signature.user_outputs if isinstance(name, str)]
    return (
        [spec(name, value) for name, value in zip(names, inputs, strict=True)],
        [spec(name, value) for name, value in zip(output_names, outputs, strict=True)],
    )


def custom_ops(program: ExportedProgram) -> list[str]:
    return sorted({op._schema.name for op in custom_overloads(program)})


def custom_overloads(program: ExportedProgram) -> set[torch._ops.OpOverload]:
    """Ops that torch itself does not bring, in the graph and in the graphs inside it."""
    found = set()
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            for node in module.graph.nodes:
                if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in (
                    "aten",
                    "prim",
                    "prims",
                ):
                    found.add(node.target)
    return found
