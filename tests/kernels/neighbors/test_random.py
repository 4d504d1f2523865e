"""Random shapes, kinds of data, dtypes and arguments against the references: what nobody thought of as a case."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from planmill.kernels import ops

WIDTHS = (1, 2, 3, 7, 16, 31, 33, 64, 129, 257)
DRAWS = 60


class Draw:
    """Choices and data of one seed."""

    def __init__(self, seed: int) -> None:
        self.g = torch.Generator().manual_seed(seed)

    def pick(self, *options: Any) -> Any:
        return options[int(torch.randint(len(options), (1,), generator=self.g))]

    def size(self, *options: int) -> int:
        return int(self.pick(*options))

    def data(self, *shape: int) -> torch.Tensor:
        """Rows of a random kind; now and then with NaN or infinity in some of them."""
        x = torch.randn(*shape, generator=self.g)
        kind = self.pick(
            "normal", "unit", "integers", "mean", "copies", "line", "large", "small", "mixed", "zeros", "near"
        )
        if kind == "unit":
            x = torch.nn.functional.normalize(x, dim=-1)
        elif kind == "integers":
            x = x.round()
        elif kind == "mean":
            x = x + float(self.pick(10.0, 1e3, 1e5))
        elif kind == "copies":
            x = x[..., :1, :].expand(*shape).clone()
        elif kind == "line":
            x = x[..., :1] * torch.randn(shape[-1], generator=self.g)
        elif kind in ("large", "small"):
            x = x * (1e12 if kind == "large" else 1e-12)
        elif kind == "mixed":
            x = x * 10 ** (3 * torch.randn(*shape[:-1], 1, generator=self.g))
        elif kind == "zeros":
            x = x * (torch.rand(*shape[:-1], 1, generator=self.g) > 0.5)
        elif kind == "near":
            x = x[..., :1, :] + 1e-4 * x
        if x.numel() and self.size(0, 0, 0, 0, 0, 1):
            rows = x.flatten(0, -2)
            hit = torch.randint(len(rows), (max(1, len(rows) // 20),), generator=self.g)
            rows[hit, self.size(0, shape[-1] - 1)] = float(self.pick(torch.nan, torch.inf, -torch.inf))
        return x


def knn(draw: Draw, dtype: torch.dtype, d: int) -> tuple:
    n, m = draw.size(1, 3, 12, 13, 97, 130), draw.size(1, 5, 300, 1023, 1025, 4100)
    q, x = draw.data(n, d), draw.data(m, d)
    if draw.size(0, 0, 1):
        shared = min(n, m)
        x[:shared] = q[:shared]
    alone = bool(draw.size(0, 0, 0, 1))
    if alone:
        q = x = x[:300]
    return q.to(dtype), x.to(dtype), draw.size(1, 2, 9, 300), draw.pick("l2", "l2sq", "cosine", "dot"), alone, True


def mutual_score(draw: Draw, dtype: torch.dtype, d: int) -> tuple:
    x = draw.data(draw.size(2, 3, 6), draw.size(1, 7, 48, 97, 130), d).to(dtype)
    return x, draw.pick(0.0, 0.2, 1.0), draw.pick(0.3, 0.9, 2.0), -1.0, 1, True


def bank_score(draw: Draw, dtype: torch.dtype, d: int) -> tuple:
    x = draw.data(draw.size(1, 3), draw.size(1, 7, 97), d).to(dtype)
    return x, draw.data(draw.size(1, 4), draw.size(1, 97, 1100), d).to(dtype), 0.0, 0.5, -1.0, 1, True


def segmented_max(draw: Draw, dtype: torch.dtype, d: int) -> tuple:
    m = draw.size(1, 33, 700, 2500)
    cuts = sorted(draw.size(0, m // 3, m // 2, m) for _ in range(draw.size(0, 1, 3)))
    q, x = draw.data(draw.size(1, 13, 100), d).to(dtype), draw.data(m, d).to(dtype)
    return q, x, torch.tensor([0, *cuts, m], dtype=torch.int32)


def mutual_matching(draw: Draw, dtype: torch.dtype, d: int) -> tuple:
    n, m, d2 = draw.size(1, 7, 13, 130), draw.size(1, 12, 97, 300), draw.size(0, 0, 5)
    maps = [draw.data(1, rows, width) for width in (d, d2) for rows in (n, m)]
    if draw.size(0, 0, 1):
        shared = min(n, m)
        maps[1][:, :shared] = maps[0][:, :shared] + draw.pick(0.0, 0.3) * torch.randn(1, shared, d, generator=draw.g)
    return *(x.to(dtype) for x in maps), draw.pick(1.0, 0.3), draw.pick(1.0, 2.0), draw.pick(1.0, 1.0, 0.9, 0.7)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize(
    "make", [knn, mutual_score, bank_score, segmented_max, mutual_matching], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_random_inputs(make: Callable[..., tuple], dtype: torch.dtype) -> None:
    spec = ops()[make.__name__]
    assert spec.compare is not None
    for seed in range(DRAWS):
        draw = Draw(seed)
        args = make(draw, dtype, draw.size(*WIDTHS))
        rows = [a.flatten(0, -2) for a in args if isinstance(a, torch.Tensor) and a.is_floating_point()]
        if not all(bool(r.isfinite().all(1).any()) for r in rows):
            continue  # nothing can match anything: the registry's cases have that
        got, want = (
            found if isinstance(found, tuple) else (found,) for found in (spec.op(*args), spec.reference(*args))
        )
        print(f"seed {seed}: {[tuple(r.shape) for r in rows]}")  # shown by pytest where the comparison fails
        spec.compare(args, got, want, 2e-6, 1e-5)
