"""The layout of activations that suits a program, by what it spends its arithmetic on."""

from typing import Any, Literal

import torch
from torch._ops import HigherOrderOperator
from torch.export import ExportedProgram
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


class _Counted(torch.fx.Interpreter):
    """Runs a program and counts what it does; what a branch or a loop of torch's does inside is not counted."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.arithmetic = _Arithmetic()

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if isinstance(target, HigherOrderOperator):
            return super().call_function(target, args, kwargs)
        with self.arithmetic:
            return super().call_function(target, args, kwargs)


def suitable_layout(program: ExportedProgram, examples: tuple[torch.Tensor, ...]) -> Layout:
    """Channels-last where convolutions do most of the arithmetic.

    The program is run for it and not the model: torch.cond, called from Python, fails where operations are counted.
    """
    counted = _Counted(program.module())
    with torch.no_grad():
        counted.run(*examples)
    return "channels_last" if counted.arithmetic.convolutions * 2 > counted.arithmetic.total else "contiguous"
