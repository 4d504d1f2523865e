"""x_t = sum_j val_tj Wd[idx_tj] + bd, in float64."""

import torch


def sparse_decoding_reference(
    values: torch.Tensor, indices: torch.Tensor, dictionary: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """Rows [T, D] of the dtype of `dictionary`; idx = -1 adds nothing, whatever val is."""
    m = dictionary.shape[0]
    if bool(((indices < -1) | (indices >= m)).any()):
        raise ValueError(f"sparse_decoding: indices must be -1 or below M = {m}")
    t, j = (indices >= 0).nonzero(as_tuple=True)
    terms = values[t, j, None].double() * dictionary[indices[t, j].long()].double()  # val_tj Wd[idx_tj]
    found = values.new_zeros(values.shape[0], dictionary.shape[1], dtype=torch.float64).index_add(0, t, terms)
    return (found + (bias.double() if bias.numel() else bias.double().sum())).to(dictionary.dtype)
