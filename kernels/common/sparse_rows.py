"""Rows chosen by index, for the gradients of sparse codes: nothing of size tokens x rows of the table is made.

Both are ops, so that a graph holds one node instead of k: the loop over k is what keeps memory at tokens x D.
"""

import torch


@torch.library.custom_op("planmill::chosen_products", mutates_args=())
def chosen_products(rows: torch.Tensor, table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """[T, k] float32: rows[t] . table[indices[t, j]]; 0 where the index is negative."""
    products = torch.zeros(indices.shape, dtype=torch.float32, device=rows.device)
    if table.shape[0]:
        for j in range(indices.shape[1]):
            chosen = table[indices[:, j].clamp_min(0).long()].float()
            products[:, j] = torch.where(indices[:, j] >= 0, (rows.float() * chosen).sum(1), 0)
    return products


@chosen_products.register_fake
def _(rows: torch.Tensor, table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(indices.shape, dtype=torch.float32)


@torch.library.custom_op("planmill::scattered_rows", mutates_args=())
def scattered_rows(rows: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    """[count, D] float32: row i is the sum of weights[t, j] * rows[t] over all (t, j) with indices[t, j] = i."""
    table = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    if count:
        for j in range(indices.shape[1]):
            weight = torch.where(indices[:, j] >= 0, weights[:, j].float(), 0)
            table.index_add_(0, indices[:, j].clamp_min(0).long(), weight[:, None] * rows.float())
    return table


@scattered_rows.register_fake
def _(rows: torch.Tensor, weights: torch.Tensor, indices: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_empty((count, rows.shape[1]), dtype=torch.float32)
