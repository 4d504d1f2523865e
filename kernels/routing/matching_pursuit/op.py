"""matching_pursuit: schema, shape rule, checks, gradient and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.matching_pursuit.cases import cases, compare
from planmill.kernels.routing.matching_pursuit.reference import matching_pursuit_reference


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradient through the atoms that were chosen, step by step from the last; no [T, M] tensor is needed."""
    x, dictionary, steps = args
    chosen = outputs[1]
    found = (chosen >= 0)[:, :, None]
    atoms = dictionary.double()
    index = chosen.clamp_min(0).long()
    r = torch.where(x.isfinite().all(1, keepdim=True), x.double(), 0)
    taken = [torch.where(found[:, k], atoms[index[:, k]] if len(atoms) else 0 * r, 0) for k in range(steps)]
    residuals, values = [], []
    for d in taken:
        residuals.append(r)
        values.append((r * d).sum(1, keepdim=True))
        r = r - values[-1] * d
    for_values = torch.zeros_like(outputs[0]) if grads[0] is None else grads[0]
    for_values = torch.where(chosen >= 0, for_values, 0).double()
    for_r = torch.zeros_like(r) if grads[2] is None else grads[2].double()
    for_atoms = torch.zeros_like(atoms)
    for k in reversed(range(steps)):
        d, r, v = taken[k], residuals[k], values[k]
        for_v = for_values[:, k, None] - (for_r * d).sum(1, keepdim=True)
        if len(atoms):
            for_atoms.index_add_(0, index[:, k], torch.where(found[:, k], for_v * r - v * for_r, 0))
        for_r = for_r + for_v * d
    return for_r.to(x.dtype), for_atoms.to(dictionary.dtype), None


SPEC = OpSpec(
    schema="matching_pursuit(Tensor x, Tensor dictionary, int steps) -> (Tensor, Tensor, Tensor)",
    outputs=lambda x, dictionary, steps: [
        ((x.shape[0], steps), torch.float32),
        ((x.shape[0], steps), torch.int32),
        ((x.shape[0], x.shape[1]), torch.float32),
    ],
    reference=matching_pursuit_reference,
    cases=cases,
    tolerances=dict.fromkeys((torch.float32, torch.bfloat16, torch.float16), (1e-5, 1e-5)),
    compare=compare,
    backward=backward,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def pursue_matches(
    x: torch.Tensor, dictionary: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Matching pursuit: per step the atom that correlates most with what is left of a token is taken out of it.

    r = x;  repeat `steps` times:  i = argmax_m <r, d_m>,  v = <r, d_i>,  r = r - v d_i

    The largest signed correlation is taken, not the largest magnitude, and an atom may be taken again, as published.
    Nothing is divided by |d_i|^2: for the residual to shrink, atoms are of length one (a layer's business). Residual
    and correlations are float32: every choice is that of float32 arithmetic on its own residual. On the CPU the
    dictionary is packed once and screened in 8-bit or 16-bit arithmetic under a proven bound at each step; no [T, M]
    tensor is made.

    Args:
        x: [T, D], float32, bfloat16 or float16, any strides.
        dictionary: [M, D], dtype and device of `x`, any strides.
        steps: number of steps K, 0 or more.

    Returns:
        values: [T, K] float32, the correlations in the order of the steps.
        indices: [T, K] int32; ties go to the lower index. Atoms that hold NaN or infinity are never taken. A token
            that holds NaN or infinity, or that has no atom to take, has index -1 and value NaN, and stays as it is.
        residual: [T, D] float32; x = residual + sum_k values[:, k] dictionary[indices[:, k]].

    Raises:
        ValueError: wrong rank or width, width 0, negative steps, another device.
        TypeError: another dtype, or dtypes that differ.

    Source: MP-SAE (Costa et al. 2025, "From Flat to Hierarchical: Extracting Sparse Representations with Matching
    Pursuit"), as in its public implementation. The paper leaves ties and NaN open. The gradient goes through the atoms
    taken, not through the choice.
    """
    op = "matching_pursuit"
    check_rank(op, "x", x, 2, "[T, D]")
    check_rank(op, "dictionary", dictionary, 2, "[M, D]")
    check_float(op, "x", x)
    check_alike(op, "dictionary", dictionary, "x", x)
    if dictionary.shape[1] != x.shape[1]:
        raise ValueError(f"{op}: dictionary must be [M, {x.shape[1]}] like x, got {list(dictionary.shape)}")
    if x.shape[1] == 0:
        raise ValueError(f"{op}: x must have at least one channel, got {list(x.shape)}")
    if steps < 0:
        raise ValueError(f"{op}: steps must be 0 or more, got {steps}")
    check_int32_range(op, "dictionary", dictionary.shape[0])
    return (_op if is_compiling() else _call)(x, dictionary, steps)
