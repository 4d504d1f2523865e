"""Sums without a scatter, as `portable` forms write them: against index_add in float64, infinities included."""

import torch

from planmill.kernels.common.portable import sum_rows, sum_segments
from planmill.kernels.routing.hash_embedding.portable import hash_rows_portable
from planmill.kernels.routing.hash_embedding.reference import hash_rows


def poisoned(g: torch.Generator, *shape: int) -> torch.Tensor:
    """Normal numbers, some of them NaN, inf or -inf."""
    x = torch.randn(*shape, generator=g)
    for value in (torch.nan, torch.inf, -torch.inf):
        x[torch.rand(*shape, generator=g) < 0.02] = value
    return x


def test_sums_of_rows(generator: torch.Generator) -> None:
    for rows, classes in ((1, 1), (5, 9), (64, 3), (101, 20)):
        x = poisoned(generator, rows, 7)
        y = torch.randint(classes, (rows,), generator=generator)
        want = torch.zeros(classes, 7, dtype=torch.float64).index_add(0, y, x.double()).float()
        got = sum_rows(torch.arange(classes)[:, None] == y, x)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_sums_of_segments(generator: torch.Generator) -> None:
    for rows in (1, 2, 7, 8, 9, 100):
        x = poisoned(generator, 2, rows, 5)
        cuts = torch.randint(0, rows + 1, (2, 6), generator=generator).sort(1).values
        cuts[0, 0], cuts[0, -1] = 0, rows
        got = sum_segments(x, cuts[:, :-1], cuts[:, 1:] - cuts[:, :-1])
        for b in range(2):
            for s in range(5):
                want = x[b, cuts[b, s] : cuts[b, s + 1]].double().sum(0).float()
                torch.testing.assert_close(got[b, s], want, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_hashes_by_their_bits(generator: torch.Generator) -> None:
    ends = torch.iinfo(torch.int64)
    values = torch.randint(ends.min, ends.max, (50, 3, 4), generator=generator)
    values[0, 0] = torch.tensor([0, -1, ends.min, ends.max])
    seeds = torch.randint(ends.min, ends.max, (3, 1), generator=generator)
    for rows in (1, 7, 1000, 2**20, 2**31 - 1):
        assert torch.equal(hash_rows_portable(values, seeds, rows), hash_rows(values, seeds, rows))
