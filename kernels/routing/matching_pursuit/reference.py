"""Greedy pursuit: per step the atom with the largest signed correlation leaves the residual; in float64."""

import torch


def matching_pursuit_reference(
    x: torch.Tensor, dictionary: torch.Tensor, steps: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [T, K] float32, indices [T, K] int32, residual [T, D] float32; NaN and -1 where nothing can match."""
    r, atoms = x.double(), dictionary.double()
    usable = atoms.isfinite().all(1)
    atoms = torch.where(usable[:, None], atoms, 0)
    values, indices = [], []
    for _ in range(steps):
        clean = torch.where(r.isfinite().all(1, keepdim=True), r, torch.nan)
        c = torch.where(usable, clean @ atoms.T, -torch.inf)  # correlations [T, M]
        c = torch.nn.functional.pad(torch.where(c.isnan(), -torch.inf, c), (0, 1), value=-torch.inf)
        i = c.detach().argmax(1)  # the first of equals
        v = c.gather(1, i[:, None])[:, 0]
        found = v.detach() > -torch.inf
        i = torch.where(found, i, -1)
        step = torch.where(found, v, 0)[:, None] * torch.nn.functional.pad(atoms, (0, 0, 0, 1))[i]
        r = torch.where(found[:, None], r - step, r)
        values.append(torch.where(found, v, torch.nan))
        indices.append(i)
    if not steps:
        return r.new_empty(len(r), 0).float(), r.new_empty(len(r), 0).int(), r.float()
    return torch.stack(values, 1).float(), torch.stack(indices, 1).int(), r.float()
