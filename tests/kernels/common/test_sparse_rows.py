"""Rows chosen by index against the dense formulas, repeated and negative indices included."""

import torch

from planmill.kernels.common.sparse_rows import chosen_products, scattered_rows


def test_products_and_sums_of_chosen_rows(generator: torch.Generator) -> None:
    rows, table = (torch.randn(n, 6, generator=generator) for n in (7, 9))
    indices = torch.randint(-1, 9, (7, 4), generator=generator, dtype=torch.int32)
    indices[0], indices[1] = -1, 3
    weights = torch.randn(7, 4, generator=generator)
    valid, place = (indices >= 0), indices.clamp_min(0).long()
    products = torch.where(valid, (rows @ table.T).gather(1, place), 0)
    torch.testing.assert_close(chosen_products(rows, table, indices), products)
    dense = torch.zeros(7, 9).scatter_add_(1, place, torch.where(valid, weights, 0))
    torch.testing.assert_close(scattered_rows(rows, weights, indices, 9), dense.T @ rows)


def test_nothing_to_choose_from() -> None:
    indices = torch.full((3, 2), -1, dtype=torch.int32)
    assert torch.equal(chosen_products(torch.ones(3, 4), torch.ones(0, 4), indices), torch.zeros(3, 2))
    assert scattered_rows(torch.ones(3, 4), torch.ones(3, 2), indices, 0).shape == (0, 4)


def test_both_are_whole_ops(generator: torch.Generator) -> None:
    rows, weights = torch.randn(3, 4, generator=generator), torch.randn(3, 2, generator=generator)
    indices = torch.tensor([[0, 1], [2, -1], [0, 0]], dtype=torch.int32)
    torch.library.opcheck(chosen_products, (rows, rows, indices))
    torch.library.opcheck(scattered_rows, (rows, weights, indices, 5))
