"""Inputs of class_moments that tests, benchmarks and plan checks share, and how its outputs are compared."""

import torch

from planmill.kernels.common.inputs import integers, normal, poison_row, strided
from planmill.kernels.common.spec import Case


def compare(args: tuple, got: tuple, want: tuple, _atol: float, rtol: float) -> None:
    """Counts exactly; means and scatter against the absolute values of what they sum."""
    x, labels, _ = args
    assert torch.equal(got[2], want[2])
    finite = x[labels >= 0].double()
    largest = finite.nan_to_num().abs().amax() if finite.numel() else torch.tensor(0.0)
    torch.testing.assert_close(got[0].double(), want[0].double(), atol=rtol * float(largest), rtol=rtol, equal_nan=True)
    assert torch.equal(got[1].isfinite(), want[1].isfinite())
    diagonal = want[1].double().diagonal().nan_to_num().clamp_min(0).sqrt()
    bound = rtol * diagonal[:, None] * diagonal + (1e-7 * largest) ** 2 * len(finite)  # a mean is rounded to float32
    error = (got[1].double() - want[1].double()).abs().nan_to_num()
    assert bool((error <= bound).all()), f"scatter: off by {error.max():.3g}"


def labelled(g: torch.Generator, x: torch.Tensor, classes: int, low: int = 0) -> tuple:
    """Random labels from `low`."""
    return x, torch.randint(low, classes, (x.shape[0],), generator=g), classes


def cases() -> list[Case]:
    f32 = (torch.float32,)
    return [
        Case("small", lambda t, g: labelled(g, normal(g, t, 12, 5), 3), gradient=True, compiled=True),
        Case("one", lambda t, g: labelled(g, normal(g, t, 1, 3), 1)),
        Case("no_rows", lambda t, g: labelled(g, normal(g, t, 0, 3), 4)),
        Case("empty_classes", lambda t, g: labelled(g, normal(g, t, 30, 6), 200)),
        Case("unlabelled", lambda t, g: labelled(g, normal(g, t, 700, 26), 9, low=-1), gradient=True),
        Case("nothing_labelled", lambda t, g: (normal(g, t, 20, 6), torch.full((20,), -1), 3)),
        Case("int32", lambda t, g: (normal(g, t, 40, 6), torch.arange(40, dtype=torch.int32) % 7, 7)),
        Case("across_a_block", lambda t, g: labelled(g, normal(g, t, 1100, 49), 17)),
        Case("one_class", lambda t, g: labelled(g, normal(g, t, 600, 25), 1)),
        Case("strided", lambda t, g: labelled(g, strided(normal(g, t, 150, 31)), 5)),
        Case("ties", lambda t, g: labelled(g, integers(g, t, 200, 20), 4)),
        Case("far_from_origin", lambda t, g: labelled(g, normal(g, t, 500, 30, mean=1000.0), 6), dtypes=f32),
        Case("nan", lambda t, g: labelled(g, poison_row(normal(g, t, 200, 20), 50), 6)),
    ]
