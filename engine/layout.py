"""What a program spends its arithmetic on, and the layout of activations that suits it."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch._subclasses import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.node import map_arg
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Layout = Literal["channels_last", "contiguous"]


class _Arithmetic(TorchDispatchMode):
    """Counts floating-point operations; torch's FlopCounterMode trips over some models without gradients (2.13)."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.convolutions = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet in flop_registry:
            flops = flop_registry[packet](*args, **(kwargs or {}), out_val=out)
            self.total += flops
            self.convolutions += flops if packet is torch.ops.aten.convolution else 0
        return out


def suitable_layout(program: ExportedProgram) -> Layout:
    """Channels-last where convolutions do most of the arithmetic."""
    counts = [found for _, found in arithmetic(program.graph)]
    return "channels_last" if 2 * sum(c.convolutions for c in counts) > sum(c.total for c in counts) else "contiguous"


def arithmetic(graph: torch.fx.Graph) -> Iterator[tuple[torch.fx.Node, _Arithmetic]]:
    """The operations of each op that multiplies, at the sizes that the program was captured with.

    Ops are counted one by one, on tensors without values, and only those with two factors: what a branch or a loop of
    torch's does inside is not counted, nor what an op of ours does, nor what has a size that only values tell.
    """
    fake = FakeTensorMode()
    known: dict[str, _Arithmetic] = {}  # layers of a model repeat each other
    for node in graph.nodes:
        if node.op != "call_function" or not _may_multiply(node):
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: _stand_in(n.meta.get("val"), fake))
        key = f"{node.target} {args} {kwargs}"
        if key not in known:
            known[key] = _Arithmetic()
            with torch.no_grad(), fake, known[key]:
                node.target(*args, **kwargs)
        yield node, known[key]


def _may_multiply(node: torch.fx.Node) -> bool:
    """Whether an op is counted, or consists of others, and has two factors to multiply, of sizes that are known."""
    op = node.target
    if not isinstance(op, torch._ops.OpOverload):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    given = [n.meta.get("val") for n in node.all_input_nodes]
    factors = [x for x in given if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())]
    sizes = [size for x in given for size in (x.shape if isinstance(x, torch.Tensor) else [x])]
    known = all(size.node.has_hint() for size in sizes if isinstance(size, torch.SymInt))
    return (composite or op._overloadpacket in flop_registry) and len(factors) > 1 and known


def _stand_in(value: Any, fake: FakeTensorMode) -> Any:
    """A tensor without values, of the size that the captured one had."""
    if isinstance(value, torch.SymInt):
        return value.node.hint
    if not isinstance(value, torch.Tensor):
        return value
    with fake:
        return torch.empty([_stand_in(size, fake) for size in value.shape], dtype=value.dtype)
