"""dictionary_lookup: schema, shape rule, checks and the public function."""

import math

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_choice, check_float, check_int32_range, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.dictionary_lookup.cases import cases
from planmill.kernels.neighbors.dictionary_lookup.reference import POWERS, dictionary_lookup_reference

OP = "dictionary_lookup"
TOLERANCES = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-3, 2e-3)}

SPEC = OpSpec(
    schema=f"{OP}(Tensor queries, Tensor keys, Tensor values, float scale, str weighting) -> Tensor",
    outputs=lambda queries, keys, values, *_: [((queries.shape[0], values.shape[1]), values.dtype)],
    reference=dictionary_lookup_reference,
    cases=cases,
    tolerances=TOLERANCES,  # of half dtypes: the result is rounded to them once
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def _check(queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    if queries.dim() < 2:
        raise ValueError(f"{OP}: queries must be [..., N, D], got {list(queries.shape)}")
    check_float(OP, "queries", queries)
    check_rank(OP, "keys", keys, 2, "[m, D]")
    check_rank(OP, "values", values, 2, "[m, Dv]")
    check_alike(OP, "keys", keys, "queries", queries)
    check_alike(OP, "values", values, "queries", queries)
    width = queries.shape[-1]
    if width == 0 or keys.shape[1] != width:
        needed = f"[m, {width}] like queries" if width else "[m, D] with D at least 1"
        raise ValueError(f"{OP}: keys must be {needed}, got {list(keys.shape)}")
    if keys.shape[0] == 0:
        raise ValueError(f"{OP}: keys must hold at least one atom, got {list(keys.shape)}")
    if values.shape[0] != keys.shape[0]:
        raise ValueError(f"{OP}: values must be [{keys.shape[0]}, Dv] like keys, got {list(values.shape)}")
    check_int32_range(OP, "keys", keys.shape[0])


def lookup_dictionary(
    queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scale: float | None = None,
    weighting: str = "sparsemax",
) -> torch.Tensor:
    """What a dictionary holds for each query: the values of few of its atoms, weighted by similarity.

        z = scale Q K^T;   P = argmin over the simplex of |p - z|^2 = max(z - tau, 0);   R = P V

    tau makes each row of P sum to one; atoms below it have weight 0 exactly. "entmax15" is softer: P = max(z/2 - tau,
    0)^2. No row is sorted, and no n x m matrix is made: atoms that cannot reach tau are ruled out by 16-bit products
    under a proven error bound, and the scores of the others are summed in float64. On the GPU all scores are products
    of 22 bits, summed in float32: off by about 2^-22 scale |q| |k - c|, with c near the mean of the keys.

    Args:
        queries: [..., N, D] with D >= 1, float32, bfloat16 or float16, any strides.
        keys: [m, D] with m >= 1, dtype and device of `queries`, any strides.
        values: [m, Dv], dtype and device of `queries`, any strides.
        scale: of the inner products, above 0; 1 / sqrt(D) if None.
        weighting: "sparsemax" or "entmax15".

    Returns:
        [..., N, Dv], dtype of `values`. Atoms with equal scores have equal weights. An atom whose key holds NaN or
        infinity is never chosen; a query that does, or a dictionary without any other atom, gives NaN. Of `values` only
        what is chosen counts: NaN or infinity there gives NaN in its column, and none elsewhere. A query's result does
        not depend on the other queries.

    Raises:
        ValueError: wrong rank or width, no atom, as many values as keys missing, a scale that is not positive and
            finite, another weighting.
        TypeError: another dtype, or dtypes that differ.

    Source: DictAS (Qu et al., "A framework for class-generalizable few-shot anomaly segmentation via dictionary
    lookup", 2025), sparse lookup; Martins, Astudillo, "From softmax to sparsemax" (2016), algorithm 1; Peters,
    Niculae, Martins, "Sparse sequence-to-sequence models" (2019), algorithm 2. Left open there, and chosen here: NaN.
    """
    _check(queries, keys, values)
    check_choice(OP, "weighting", weighting, tuple(POWERS))
    factor = 1 / math.sqrt(queries.shape[-1]) if scale is None else float(scale)
    if not 0 < factor < math.inf:
        raise ValueError(f"{OP}: scale must be positive and finite, got {scale}")
    rows = queries.reshape(-1, queries.shape[-1])
    found = (_op if is_compiling() else _call)(rows, keys, values, factor, weighting)
    return found.view(*queries.shape[:-1], values.shape[1])
