"""bank_score: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_alike, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.neighbors.bank_score.cases import cases
from planmill.kernels.neighbors.bank_score.reference import bank_score_reference
from planmill.kernels.neighbors.mutual_score.cases import compare
from planmill.kernels.neighbors.mutual_score.op import check_scoring

SPEC = OpSpec(
    schema=(
        "bank_score(Tensor features, Tensor bank, float low, float high, float radius, int width, bool exact) -> Tensor"
    ),
    outputs=lambda features, bank, low, high, radius, width, exact: [
        ((features.shape[0], features.shape[1]), torch.float32),
    ],
    reference=bank_score_reference,
    portable="portable:bank_score_portable",
    cases=cases,
    compare=compare,
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def score_against_bank(
    features: torch.Tensor,
    bank: torch.Tensor,
    low: float = 0.0,
    high: float = 0.3,
    *,
    radius: float | None = None,
    grid: tuple[int, int] | None = None,
    exact: bool | None = None,
) -> torch.Tensor:
    """Anomaly score of every patch of new images, from the stored images of a bank.

    The formula of `score_mutually` with the M images of the bank in place of the other images of the set: the bank is
    not scored again, and the score of an image does not depend on the images beside it.

    Args:
        features: [N, P, C], float32, bfloat16 or float16, any strides; N may be 0.
        bank: [M, Q, C] with M >= 1, dtype and device of `features`, any strides; Q = P with a radius.
        low, high, radius, grid, exact: as in `score_mutually`, with M in place of N - 1.

    Returns:
        [N, P] float32. A patch that holds NaN or infinity matches nothing and scores inf.

    Raises:
        ValueError: an empty bank, wrong rank or width, a grid of another size, low < 0, high <= 0, radius < 0.
        TypeError: another dtype, or dtypes that differ.

    Source: MuSc (Li et al., ICLR 2024), section 3.2, with a fixed reference set.
    """
    op = "bank_score"
    scalars = check_scoring(op, features, low, high, radius, grid, exact)
    check_rank(op, "bank", bank, 3, "[M, Q, C]")
    check_alike(op, "bank", bank, "features", features)
    if bank.shape[0] == 0 or bank.shape[1] == 0:
        raise ValueError(f"{op}: bank must hold at least one image with one patch, got {list(bank.shape)}")
    if bank.shape[2] != features.shape[2]:
        raise ValueError(f"{op}: bank must be [M, Q, {features.shape[2]}] like features, got {list(bank.shape)}")
    if radius is not None and bank.shape[1] != features.shape[1]:
        raise ValueError(f"{op}: with a radius bank must be [M, {features.shape[1]}, C], got {list(bank.shape)}")
    return (_op if is_compiling() else _call)(features, bank, *scalars)
