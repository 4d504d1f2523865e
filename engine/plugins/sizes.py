"""An op's shape rule, run on sizes that are not known yet.

`OpSpec.outputs` computes with + - * // on the dimensions of its arguments. Here it is given stand-ins for tensors whose
dimensions record that arithmetic; the recorded expression is then evaluated on numbers, or written with the expression
builder of whichever library wants it. A rule that does anything else with a dimension is refused by name.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from planmill.kernels import OpSpec


@dataclass(frozen=True, eq=False)
class Expression:
    """A size: dimension `left` of tensor `right` where `operation` is "dim", else an operation on two sizes."""

    operation: str
    left: Any
    right: Any

    def __add__(self, other: Any) -> Any:
        return self if _is(other, 0) else Expression("+", self, _size(other))

    __radd__ = __add__

    def __sub__(self, other: Any) -> Any:
        return self if _is(other, 0) else Expression("-", self, _size(other))

    def __rsub__(self, other: Any) -> Any:
        return Expression("-", _size(other), self)

    def __mul__(self, other: Any) -> Any:
        if _is(other, 0):
            return 0
        return self if _is(other, 1) else Expression("*", self, _size(other))

    __rmul__ = __mul__

    def __floordiv__(self, other: Any) -> Any:
        return self if _is(other, 1) else Expression("//", self, _size(other))

    def __rfloordiv__(self, other: Any) -> Any:
        return Expression("//", _size(other), self)

    def _refuse(self, *_: Any) -> NoReturn:
        raise TypeError("a shape rule may use + - * // on dimensions, and nothing else")

    __bool__ = __int__ = __index__ = __float__ = __mod__ = __truediv__ = __neg__ = __pow__ = _refuse
    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _refuse
    __hash__ = None  # type: ignore[assignment]


def _is(value: Any, number: int) -> bool:
    return isinstance(value, int) and value == number


def _size(value: Any) -> Any:
    if not isinstance(value, int | Expression):
        raise TypeError(f"a shape rule computes with integers and dimensions, not with {type(value).__name__}")
    return value


@dataclass(frozen=True)
class Shape:
    """A tensor of which only shape and dtype are known."""

    shape: tuple[Any, ...]
    dtype: torch.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def dim(self) -> int:
        return len(self.shape)


def tensor_arguments(spec: OpSpec) -> list[str]:
    """The names of the op's tensors, in order: the inputs of its node."""
    return [a.name for a in spec.parsed.arguments if str(a.type) == "Tensor"]


def bind(spec: OpSpec, tensors: Iterable[Any], attributes: dict[str, Any]) -> list[Any]:
    """The op's arguments in the order of its schema, from its tensors and the values of the others by name."""
    given = iter(tensors)
    return [next(given) if str(a.type) == "Tensor" else attributes[a.name] for a in spec.parsed.arguments]


def trace_outputs(
    spec: OpSpec, dims: Sequence[Sequence[int | None]], dtypes: Sequence[torch.dtype], attributes: dict[str, Any]
) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Shapes and dtypes of the op's outputs.

    Args:
        spec: the op.
        dims: the sizes of each tensor; None where a size is not known yet, which gives an Expression.
        dtypes: the dtype of each tensor.
        attributes: the op's other arguments by name.

    Raises:
        TypeError: the shape rule does something else than + - * // with a dimension.
    """
    tensors = [
        Shape(tuple(Expression("dim", axis, i) if n is None else n for axis, n in enumerate(sizes)), dtype)
        for i, (sizes, dtype) in enumerate(zip(dims, dtypes, strict=True))
    ]
    try:
        made = spec.outputs(*bind(spec, tensors, attributes))
    except TypeError as error:
        raise TypeError(f"{spec.name}: {error}") from error
    return [(tuple(_size(n) for n in shape), dtype) for shape, dtype in made]


def evaluate(size: Any, dim: Callable[[int, int], Any], operate: Callable[[str, Any, Any], Any]) -> Any:
    """An expression in another arithmetic.

    Args:
        size: an int or an Expression.
        dim: `dim(tensor, axis)`: that dimension in the other arithmetic.
        operate: `operate("+", a, b)` there; operands may be plain ints.
    """
    if isinstance(size, int):
        return size
    if size.operation == "dim":
        return dim(size.right, size.left)
    return operate(size.operation, evaluate(size.left, dim, operate), evaluate(size.right, dim, operate))
