"""What all rewrites stand on: a captured program as an editable graph, its constants in float64, affine steps in it."""

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import GraphModule, Node

aten = torch.ops.aten
Call: TypeAlias = Any  # a Node; torch.fx types its arguments as any of twenty kinds, which is no help here

CONVOLUTIONS = {aten.conv1d.default: 1, aten.conv2d.default: 2, aten.conv3d.default: 3}  # to spatial dimensions
# What a subgraph of parameters may consist of and still be one constant; arithmetic, choices and views only.
_FOLDABLE = {
    *(aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.neg, aten.reciprocal, aten.pow, aten.square),
    *(aten.sqrt, aten.rsqrt, aten.exp, aten.abs, aten.sum, aten.eq, aten.ne, aten.gt, aten.lt, aten.any, aten.all),
    *(aten.where, aten.stack, aten.cat, aten.ones_like, aten.zeros_like, aten.full_like, aten.clone, aten.alias),
    *(aten.detach, aten.detach_, aten.lift_fresh_copy, aten.view, aten.reshape, aten.unsqueeze, aten.squeeze),
    *(aten.flatten, aten.select, aten.slice, aten.narrow, aten.permute, aten.transpose, aten.t, aten.expand),
    *(aten.scalar_tensor, aten.logical_not, aten.clamp, aten.contiguous),
}
# What reads a tensor's memory as it lies there: a pass may change how it lies.
_BY_STRIDES = {aten.as_strided.default, aten.view_as_complex.default, aten.view.dtype}
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout}
_SMALL = 1 << 16


class Affine(NamedTuple):
    """A step y = scale * x + shift of a graph.

    Args:
        source: x.
        scale: float64, of the rank of x, 1 in every dimension along which it does not change.
        shift: the same.
    """

    source: Call
    scale: torch.Tensor
    shift: torch.Tensor

    def along(self, dim: int, size: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scale and shift [size] where they change along `dim` only, and are finite; else None."""
        found = []
        for value in (self.scale, self.shift):
            if any(length != 1 for index, length in enumerate(value.shape) if index != dim % value.dim()):
                return None
            if not value.isfinite().all():
                return None
            found.append(value.flatten().expand(size))
        return found[0], found[1]


class Program:
    """A captured program while rewrites work on it.

    Args:
        module: functional, with parameters and buffers as attributes and a fake tensor (`meta["val"]`) on every node.
        given: the model as it was given. A constant of `module` that is one of its parameters cast to less precision is
            read from there: what is folded is rounded once.
    """

    def __init__(self, module: GraphModule, given: torch.nn.Module) -> None:
        self.module, self.graph = module, module.graph
        self._given = {**dict(given.named_parameters()), **dict(given.named_buffers())}
        self._known: dict[Call, bool] = {}
        self._values: dict[Call, torch.Tensor] = {}
        self._made: dict[tuple, list[str]] = {}
        # Of halves.py: roundings of what is float32 where the program has 16 bits; operations of each call before that.
        self.roundings: set[Call] = set()
        self.arithmetic: dict[Call, int] = {}
        self._drop_what_does_nothing()
        self._keep_strides()

    def _drop_what_does_nothing(self) -> None:
        """Assertions about dtypes, dropout in eval mode, casts to the dtype that there is: they only hide patterns."""
        for node in list(self.graph.nodes):
            if node.target is aten.view.default:  # a pass may change strides; nothing writes through views here
                node.target = aten.reshape.default
            if node.target is aten._assert_tensor_metadata.default:
                self.graph.erase_node(node)
            elif (node.target is aten.dropout.default and node.args[2] is False) or (
                node.target is aten.to.dtype and node.args[1] is dtype_of(node.args[0])
            ):
                node.replace_all_uses_with(node.args[0])
                self.graph.erase_node(node)

    def _keep_strides(self) -> None:
        """Where strides matter, what is contiguous is made to stay so."""
        for node in list(self.graph.nodes):
            if node.target in _BY_STRIDES and node.args[0].meta["val"].is_contiguous():
                node.replace_input_with(node.args[0], self.emit(node, aten.contiguous.default, node.args[0]))

    def calls(self, *targets: Any) -> Iterator[Call]:
        """Calls of these, or all calls, in order; the graph may change meanwhile: what is gone by then is left out."""
        for node in list(self.graph.nodes):
            if node.op == "call_function" and node.users and (not targets or node.target in targets):
                yield node

    def is_constant(self, node: Any) -> bool:
        """Whether a node depends on parameters and buffers only, through steps that can be folded."""
        if not is_node(node):
            return False
        if node not in self._known:
            self._known[node] = self._depends_on_weights(node)
        return self._known[node]

    def _depends_on_weights(self, node: Call) -> bool:
        if node.op == "get_attr":
            return isinstance(_attribute(self.module, str(node.target)), torch.Tensor)
        packet = getattr(node.target, "overloadpacket", None)
        if node.op != "call_function" or (packet not in _FOLDABLE and node.target not in _CASTS):
            return False
        inputs = node.all_input_nodes
        if not inputs or not all(map(self.is_constant, inputs)) or node.kwargs.get("dtype") is not None:
            return False
        size, largest = (max(n.meta["val"].numel() for n in nodes) for nodes in ([node], inputs))
        return size <= max(largest, _SMALL)  # an expanded constant is not kept as such

    def constant(self, node: Any) -> torch.Tensor | None:
        """The value of a constant, floats as float64, rounded nowhere on the way; None of anything else."""
        if not self.is_constant(node):
            return None
        if node in self._values:
            return self._values[node]
        value = self._evaluate(node)
        if value.numel() <= _SMALL:
            self._values[node] = value
        return value

    def _evaluate(self, node: Call) -> torch.Tensor:
        if node.op == "get_attr":
            value = _attribute(self.module, str(node.target))
            given = self._given.get(str(node.target))
            if given is not None and given.shape == value.shape and given.to(value.dtype).equal(value):
                value = given
            return value.detach().double() if value.is_floating_point() else value.detach()
        if node.target in _CASTS:
            value = self._evaluate(node.args[0])
            return value.double() if dtype_of(node).is_floating_point else value.to(dtype_of(node))
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), self.constant)
        return node.target(*args, **kwargs)

    def emit(self, before: Call, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Call:
        """A new call before a node."""
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        fake_args, fake_kwargs = torch.fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        with enable_python_dispatcher():  # torch 2.11's own linear cannot read free sizes
            node.meta["val"] = target(*fake_args, **fake_kwargs)
        return node

    def emit_constant(self, before: Call, value: torch.Tensor, dtype: torch.dtype) -> Call:
        """A new constant before a node: `value` rounded once to `dtype`; what layers share, their constants share.

        What is rounded to 16 bits is remembered as it was: a later pass may want it in float32.
        """
        rounded = value.to(dtype).contiguous()
        key = dtype, tuple(rounded.shape), float(rounded.sum(dtype=torch.float64))
        alike = self._made.setdefault(key, [])
        same = (made for made in alike if getattr(self.module, made).equal(rounded))
        name = next((made for made in same if made not in self._given or self._given[made].equal(value)), "")
        if not name:
            name = f"_rewritten_{sum(map(len, self._made.values()))}"
            alike.append(name)
            self.module.register_buffer(name, rounded)
            if dtype.itemsize == 2:
                self._given[name] = value
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(name)
        mode = next(n for n in self.graph.nodes if n.op == "placeholder").meta["val"].fake_mode
        node.meta["val"] = mode.from_tensor(getattr(self.module, name), static_shapes=True)
        if value.numel() <= _SMALL:
            self._values[node] = value.double()
        return node

    def replace(self, old: Call, new: Call) -> None:
        """`new` in place of `old` everywhere; what nothing uses any more goes."""
        self.replace_all([(old, new)])

    def replace_all(self, pairs: Iterable[tuple[Call, Call]]) -> None:
        """`replace` for several, all of them before anything goes."""
        for old, new in pairs:
            old.replace_all_uses_with(new)
            self.graph.erase_node(old)  # what torch marks as random, attention too, is no dead code to it
        self.graph.eliminate_dead_code()
        self.graph.lint()

    def affine(self, node: Any) -> Affine | None:
        """The affine step that a node is; None where it is another one, or its constant makes the tensor larger."""
        if not is_node(node) or node.op != "call_function":
            return None
        found = self._batch_norm(node) or self._arithmetic(node)
        if found is None:
            return None
        source, scale, shift = found
        shape = shape_of(source)
        if not shape or not dtype_of(source).is_floating_point:
            return None
        padded = []
        for value in (scale, shift):
            if value.dim() > len(shape):
                return None
            value = value.reshape([1] * (len(shape) - value.dim()) + list(value.shape))
            if any(length not in (1, size) for length, size in zip(value.shape, shape, strict=True)):
                return None
            padded.append(value)
        return Affine(source, *padded)

    def _arithmetic(self, node: Call) -> tuple[Call, torch.Tensor, torch.Tensor] | None:
        packet = getattr(node.target, "overloadpacket", None)
        if packet not in (aten.add, aten.sub, aten.rsub, aten.mul, aten.div) or len(node.args) != 2:
            return None
        if set(node.kwargs) - {"alpha"}:
            return None
        left, right = node.args
        alpha = float(node.kwargs.get("alpha", 1))
        if packet is aten.rsub:
            left, right, packet = right, left, aten.sub
        one = torch.ones((), dtype=torch.float64)
        first, second = self._operand(left), self._operand(right)
        if (first is None) == (second is None):
            return None
        source, c = (left, second) if second is not None else (right, first)
        assert c is not None
        if packet is aten.mul:
            return source, c, 0 * one
        if packet is aten.div:
            return (source, 1 / c, 0 * one) if second is not None else None
        sign = 1.0 if packet is aten.add else -1.0
        if second is not None:
            return source, one, sign * alpha * c
        return source, sign * alpha * one, c

    def _operand(self, value: Any) -> torch.Tensor | None:
        """A constant operand as float64; None for anything else."""
        if isinstance(value, bool | int | float):
            return torch.tensor(float(value), dtype=torch.float64)
        found = self.constant(value)
        return None if found is None else found.double()

    def _batch_norm(self, node: Call) -> tuple[Call, torch.Tensor, torch.Tensor] | None:
        """A batch norm by its running statistics, per channel in dimension 1."""
        if node.target is aten.batch_norm.default:
            x, weight, bias, mean, var, training, _, eps = node.args[:8]
            if training is not False:
                return None
        elif (
            node.target is operator.getitem
            and getattr(node.args[0], "target", None) is _INFERENCE_NORM
            and node.args[1] == 0
        ):
            x, weight, bias, mean, var, _, eps = node.args[0].args[:7]
        else:
            return None
        center, spread = self.constant(mean), self.constant(var)
        gamma, beta = self.constant(weight), self.constant(bias)
        if center is None or spread is None or (weight is not None and gamma is None):
            return None
        if bias is not None and beta is None:
            return None
        scale = (torch.ones_like(spread) if gamma is None else gamma) * torch.rsqrt(spread + float(eps))
        shift = (torch.zeros_like(spread) if beta is None else beta) - center * scale
        shape = [1, -1] + [1] * (len(shape_of(x)) - 2)
        return x, scale.reshape(shape), shift.reshape(shape)


_INFERENCE_NORM = aten._native_batch_norm_legit_no_training.default


def is_node(value: Any) -> bool:
    """Whether an argument is a node; the others are numbers, lists, None."""
    return isinstance(value, Node)


def is_linear(node: Any) -> bool:
    """Whether a node is a linear layer: a matrix of weights, and a bias per output if any (torch takes others too)."""
    if not is_node(node) or node.target is not aten.linear.default:
        return False
    weight, bias = shape_of(node.args[1]), argument(node, 2, "bias")
    return len(weight) == 2 and (bias is None or tuple(shape_of(bias)) == tuple(weight[:1]))


def dtype_of(node: Any) -> torch.dtype:
    """The dtype of a node's tensor."""
    return node.meta["val"].dtype


def shape_of(node: Any) -> Sequence[Any]:
    """The sizes of a node's tensor; symbols where they are dynamic."""
    return node.meta["val"].shape


def only_user(node: Call) -> Call | None:
    """The one node that uses another, or None."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def argument(node: Call, index: int, name: str, default: Any = None) -> Any:
    """An argument of a call, wherever it stands."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def fits(value: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether rounding to a dtype costs only last digits along all of dimension 0: float16 ends at 65504 and 6e-8."""
    if not value.numel():
        return True
    rows = value.reshape(len(value), -1)
    lost = (rows.to(dtype).double() - rows).abs().amax(1)
    return bool((lost <= torch.finfo(dtype).eps * rows.abs().amax(1)).all())


def _attribute(module: torch.nn.Module, name: str) -> Any:
    value: Any = module
    for part in name.split("."):
        value = getattr(value, part)
    return value
