"""Building blocks of test inputs, shared by the `cases.py` of the ops."""

import torch


def normal(g: torch.Generator, dtype: torch.dtype, *shape: int, mean: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    """Gaussian values of `dtype`."""
    return (torch.randn(*shape, generator=g) * scale + mean).to(dtype)


def unit(g: torch.Generator, dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Rows of length one, then rounded to `dtype`."""
    return torch.nn.functional.normalize(torch.randn(*shape, generator=g), dim=-1).to(dtype)


def integers(g: torch.Generator, dtype: torch.dtype, *shape: int, high: int = 3) -> torch.Tensor:
    """Small integers: exact in every dtype, and full of ties."""
    return torch.randint(0, high, shape, generator=g).to(dtype)


def strided(x: torch.Tensor) -> torch.Tensor:
    """The same values behind other strides: every second column of a transposed, padded buffer."""
    wide = x.new_full((*x.shape[:-2], 2 * x.shape[-1], x.shape[-2] + 3), torch.nan)
    view = wide[..., ::2, : x.shape[-2]].transpose(-1, -2)
    view.copy_(x)
    return view


def poison_row(x: torch.Tensor, row: int, value: float = torch.nan) -> torch.Tensor:
    """A copy of `x` with one entry of row `row` (of the flattened rows) set to `value`."""
    y = x.clone()
    y.view(-1, y.shape[-1])[row, y.shape[-1] // 2] = value
    return y
