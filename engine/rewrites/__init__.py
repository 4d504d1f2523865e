"""Exact inference-time rewrites of a captured program: each pass is a file, and each says what equation it uses.

What a pass folds is computed in float64 from the parameters as they were given and rounded once. A pass fires only
where its equation holds whatever the input is; the plan is still verified against the model as it was given.
"""

import importlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch.export import Dim

from planmill.engine.capture import Captured, custom_ops, may_write, quiet_copies
from planmill.engine.errors import PlanError, first_line
from planmill.engine.rewrites.graph import Program

# Every pass, in the order in which they run, again and again until none fires.
PASSES = (
    "affine_into_output",
    "linear_into_linear",
    "normalization_into_input",
    "normalization_into_padding",
    "upsample_last",
    "one_upsample",
    "shared_convolution",
    "stem_convolution",
    "winograd_convolution",
    "packed_linear",
    "softmax_attention",
    "float32_arithmetic",
    "late_rounding",
    "contiguous_input",
)
# On a CPU these save no more than they cost: sharing a convolution reads the image once and copies behind the split; an
# image padded with its mean needs no subtraction, and is a copy.
_ASKED_FOR = ("shared_convolution", "normalization_into_padding")
# These put ops of ours for the CPU into the program, and hide what the others look for: they run once, after those.
_LAST = PASSES[PASSES.index("stem_convolution") :]
DEFAULT = tuple(name for name in PASSES if name not in (*_ASKED_FOR, *_LAST))
_ROUNDS = 8


def default_passes(target: str, device: str) -> tuple[str, ...]:
    """The passes that a plan for `target` on `device` gets unless it is told otherwise."""
    return (*DEFAULT, *_LAST) if (target, device) == ("aoti", "cpu") else DEFAULT


def rewrite(captured: Captured, passes: Sequence[str] = DEFAULT) -> Captured:
    """Apply passes to a captured program.

    Args:
        captured: the model; its reference stays the model as it was given.
        passes: names out of PASSES.

    Returns:
        The same model with another program, and in `rewrites` the passes that fired; `captured` itself where none does.

    Raises:
        PlanError: an unknown pass, or a program that can no longer be exported.
    """
    unknown = sorted(set(passes) - set(PASSES))
    if unknown:
        raise PlanError(f"no rewrite named {unknown[0]!r}; there are {', '.join(PASSES)}")
    program = Program(_editable(captured), captured.reference)
    fired: list[str] = []
    for _ in range(_ROUNDS):
        again = [name for name in PASSES if name in passes and name not in _LAST and _apply(name, program)]
        fired += [name for name in again if name not in fired]
        if not again:
            break
    fired += [name for name in _LAST if name in passes and _apply(name, program)]
    if not fired:
        return captured
    program.module.recompile()
    exported = _exported(captured, program)
    return replace(captured, program=exported, ops=custom_ops(exported), rewrites=fired)


def _apply(name: str, program: Program) -> int:
    return importlib.import_module(f"{__name__}.{name}").apply(program)


def _editable(captured: Captured) -> torch.fx.GraphModule:
    """The program with parameters as attributes, in functional form: nothing writes into what a pattern has seen."""
    program = captured.program
    with quiet_copies(), torch.no_grad():
        if any(may_write(node) for node in program.graph.nodes):
            program = program.run_decompositions({})
        return program.module(check_guards=False)


def _exported(captured: Captured, program: Program) -> torch.export.ExportedProgram:
    dims = {name: Dim(name, min=d.minimum, max=d.maximum) for name, d in captured.dynamic.items()}
    shapes = tuple(
        {index: dims[size] for index, size in enumerate(spec.shape) if isinstance(size, str)}
        for spec in captured.inputs
    )
    try:
        with torch.no_grad(), quiet_copies():
            return torch.export.export(program.module, captured.examples, dynamic_shapes=shapes, strict=False)
    except (RuntimeError, ValueError) as error:
        raise PlanError(
            f"the rewritten program cannot be exported: {first_line(error)}: build without rewrites (--no-rewrite)"
        ) from error
