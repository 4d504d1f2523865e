"""Inputs of similarity_attention that tests, benchmarks and plan checks share."""

from typing import Any

import torch

from planmill.kernels.attention.similarity_attention.reference import scores
from planmill.kernels.common.inputs import normal, poison_row, strided
from planmill.kernels.common.spec import Case

FLOAT32 = (torch.float32,)
MARGIN = 1e-5  # a score nearer to 0 may count or not


def drawn(
    dtype: torch.dtype, g: torch.Generator, batch: int, rows: int, width: int, columns: int, *, mean: float = 0.3,
    beta: float = 1.2, gamma: float = 3.0, coupled: bool = False,
) -> tuple:  # fmt: skip
    """Arguments with features around a common mean and random values."""
    features = normal(g, dtype, batch, rows, width, mean=mean)
    return features, normal(g, dtype, batch, rows, columns), beta, gamma, coupled


def compare(args: tuple, got: tuple, want: tuple, atol: float, rtol: float) -> None:
    """Element-wise, but for rows with a score so near to 0 that rounding decides whether it counts."""
    S = scores(args[0], *args[2:])
    doubtful = ((S.abs() < MARGIN) & (S != 0)).any(2)  # exactly 0: all features are
    assert int(doubtful.sum()) * 10 <= doubtful.numel(), "most rows have a score on the edge"
    torch.testing.assert_close(got[0][~doubtful], want[0][~doubtful], atol=atol, rtol=rtol, equal_nan=True)


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    features, values, *rest = drawn(dtype, g, 2, 19, 12, 10)
    return strided(features), strided(values), *rest


def _nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    features, values, *rest = drawn(dtype, g, 3, 21, 8, 9)
    return poison_row(features, 25), poison_row(values, 3), *rest


def _zero_features(dtype: torch.dtype, g: torch.Generator) -> tuple:
    features, *rest = drawn(dtype, g, 2, 21, 8, 9)
    features[0, 4] = 0
    features[1] = 0
    return features, *rest


def cases() -> list[Case]:
    def case(id: str, *sizes: int, dtypes: Any = None, gradient: bool = False, compiled: bool = False, **options: Any):
        def make(dtype: torch.dtype, g: torch.Generator) -> tuple:
            batch, rows, width, columns = sizes
            return drawn(dtype, g, batch, rows, width, columns, **options)

        kinds = {} if dtypes is None else {"dtypes": dtypes}
        return Case(id, make, gradient=gradient, compiled=compiled, **kinds)

    return [  # batch, rows, width, columns
        case("small", 2, 5, 6, 7, compiled=True, gradient=True, dtypes=(torch.float32, torch.bfloat16)),
        case("one", 1, 1, 1, 1),
        case("odd", 3, 11, 9, 13, gradient=True),
        case("coupled", 3, 11, 9, 13, coupled=True, gradient=True),
        case("past_a_panel", 2, 65, 40, 70),
        case("wide", 1, 40, 200, 150),
        case("alone", 2, 30, 16, 9, mean=4.0),  # mean cosine above 1 / beta: no pair is left for most rows
        case("everything", 2, 30, 16, 9, mean=4.0, beta=0.5),
        case("sharp", 2, 70, 12, 8, gamma=100.0, dtypes=FLOAT32),
        case("tiny_features", 2, 30, 16, 9, mean=0.0, beta=1.08),
        case("no_batch", 0, 5, 6, 7),
        case("no_rows", 2, 0, 6, 7),
        case("no_columns", 2, 5, 6, 0),
        Case("strided", _strided),
        Case("zero_features", _zero_features),
        Case("nan", _nan),
    ]
