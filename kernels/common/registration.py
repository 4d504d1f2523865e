"""From an OpSpec to `torch.ops.planmill.<name>`: definition, backends, fake and autograd.

`Library.define` + `impl` instead of `custom_op`: the call costs about 2 us instead of 8. The Autograd key is a C++ gate
where the extension is built: it costs nothing when no input requires a gradient.
"""

from collections.abc import Callable
from typing import Any

import torch

from planmill.kernels.common import cpu
from planmill.kernels.common.spec import NAMESPACE, REGISTRY, OpSpec

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def register(spec: OpSpec) -> tuple[torch._ops.OpOverload, Callable[..., Any]]:
    """Register an op with torch and enter it into the registry.

    Returns:
        The overload, `torch.ops.planmill.<name>.default`, for code that dynamo traces; and the dispatcher call behind
        it for eager code, which saves the overload's Python frame (0.4 of 6 us).

    Raises:
        ValueError: an op of that name exists.
    """
    if spec.name in REGISTRY:
        raise ValueError(f"{spec.name}: declared twice")
    _LIBRARY.define(spec.schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(spec.name, _reference(spec), "CompositeExplicitAutograd")
    if spec.cpu and spec.cpu != "C++":
        _LIBRARY.impl(spec.name, _lazy(spec, spec.cpu), "CPU")
    if spec.cuda:
        _LIBRARY.impl(spec.name, _lazy(spec, spec.cuda), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{spec.name}", _fake(spec), lib=_LIBRARY)
    _register_autograd(spec)
    REGISTRY[spec.name] = spec
    return spec.op, spec.op._op


def _reference(spec: OpSpec) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        with torch.no_grad():
            return spec.reference(*args)

    return run


def _lazy(spec: OpSpec, target: str) -> Callable[..., Any]:
    """The kernel of `target`, imported at its first call: importing planmill imports neither triton nor numba."""
    kernel: Callable[..., Any] | None = None

    def run(*args: Any) -> Any:
        nonlocal kernel
        if kernel is None:
            kernel = spec.load(target)
        return kernel(*args)

    return run


def _fake(spec: OpSpec) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        outputs = tuple(torch.empty(tuple(shape), dtype=dtype, device=device) for shape, dtype in spec.outputs(*args))
        return outputs if len(outputs) > 1 else outputs[0]

    return run


class _Differentiate(torch.autograd.Function):
    """Gradient of an op: its own, or that of its reference run again."""

    @staticmethod
    def forward(ctx: Any, spec: OpSpec, *args: Any) -> Any:
        ctx.spec = spec
        ctx.is_tensor = [isinstance(a, torch.Tensor) for a in args]
        ctx.constants = [None if t else a for a, t in zip(args, ctx.is_tensor, strict=True)]
        with torch._C._AutoDispatchBelowAutograd():
            out = spec.op(*args)
        outputs = out if isinstance(out, tuple) else (out,)
        saved = [a for a in args if isinstance(a, torch.Tensor)]
        ctx.save_for_backward(*saved, *(outputs if spec.backward else ()))
        ctx.mark_non_differentiable(*(o for o in outputs if not o.is_floating_point()))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> Any:
        saved = iter(ctx.saved_tensors)
        args = tuple(
            next(saved) if tensor else constant for tensor, constant in zip(ctx.is_tensor, ctx.constants, strict=True)
        )
        if ctx.spec.backward is not None:
            return (None, *ctx.spec.backward(args, tuple(saved), grads))
        return (None, *_recompute(ctx.spec.reference, args, ctx.needs_input_grad[1:], grads))


def _recompute(
    reference: Callable[..., Any], args: tuple, needed: tuple[bool, ...], grads: tuple[torch.Tensor | None, ...]
) -> list[torch.Tensor | None]:
    """Gradients of `reference` with respect to the arguments that need one."""
    again = [a.detach().requires_grad_() if need else a for a, need in zip(args, needed, strict=True)]
    with torch.enable_grad():
        out = reference(*again)
    outputs = out if isinstance(out, tuple) else (out,)
    pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
    result: list[torch.Tensor | None] = [None] * len(args)
    if pairs:
        inputs = [a for a, need in zip(again, needed, strict=True) if need]
        found = iter(torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs], allow_unused=True))
        result = [next(found) if need else None for need in needed]
    return result


def _register_autograd(spec: OpSpec) -> None:
    def differentiate(*args: Any) -> Any:
        return _Differentiate.apply(spec, *args)

    if not spec.differentiable:
        _LIBRARY.impl(spec.name, torch.library.fallthrough_kernel, "Autograd")
    elif (extension := cpu.extension()) is not None:
        extension.register_autograd_gate(f"{NAMESPACE}::{spec.name}", differentiate)
    else:

        def gate(*args: Any) -> Any:
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                return differentiate(*args)
            with torch._C._AutoDispatchBelowAutograd():
                return spec.op(*args)

        _LIBRARY.impl(spec.name, gate, "Autograd")
