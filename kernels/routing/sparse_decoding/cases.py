"""Inputs of sparse_decoding that tests, benchmarks and plan checks share."""

import torch

from planmill.kernels.common.inputs import normal, strided
from planmill.kernels.common.spec import Case


def codes(
    dtype: torch.dtype, g: torch.Generator, tokens: int, k: int, m: int, d: int, *, bias: bool = True,
    scale: float = 1.0,
) -> tuple:  # fmt: skip
    """float32 values and indices in any order, some of them -1, some repeated, for a dictionary of `dtype`."""
    indices = torch.randint(-1, m, (tokens, k), generator=g, dtype=torch.int32)
    b = normal(g, dtype, d, scale=scale) if bias else torch.empty(0, dtype=dtype)
    return normal(g, torch.float32, tokens, k), indices, normal(g, dtype, m, d, scale=scale), b


def _dropped(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """A token without a latent, one with the same latent everywhere, NaN and infinity where the index is -1."""
    values, indices, dictionary, bias = codes(dtype, g, 9, 5, 12, 20)
    indices[2], indices[3], indices[4, 1], indices[5, 2] = -1, 7, -1, -1
    values[4, 1], values[5, 2] = torch.nan, torch.inf
    return values, indices, dictionary, bias


def _nan(dtype: torch.dtype, g: torch.Generator) -> tuple:
    """NaN in a value and infinity in a row of the dictionary that one token chose."""
    values, indices, dictionary, bias = codes(dtype, g, 6, 3, 30, 17)
    indices.clamp_(0, 28)
    indices[4, 1], values[2, 1] = 29, torch.nan
    dictionary[29, 5] = torch.inf
    return values, indices, dictionary, bias


def _strided(dtype: torch.dtype, g: torch.Generator) -> tuple:
    values, indices, dictionary, bias = codes(dtype, g, 8, 4, 25, 40)
    wide = torch.stack([bias, torch.full_like(bias, torch.nan)], 1)
    return strided(values), indices.T.contiguous().T, strided(dictionary), wide[:, 0]


def cases() -> list[Case]:
    float32 = (torch.float32,)
    return [
        Case("small", lambda t, g: codes(t, g, 5, 3, 11, 8), gradient=True, compiled=True),
        Case("one", lambda t, g: codes(t, g, 1, 1, 1, 1)),
        Case("no_bias", lambda t, g: codes(t, g, 7, 6, 40, 33, bias=False), gradient=True),
        Case("odd", lambda t, g: codes(t, g, 13, 9, 70, 259)),
        Case("many", lambda t, g: codes(t, g, 11, 64, 500, 96)),
        Case("dropped", _dropped),
        Case("nan", _nan),
        Case("strided", _strided),
        Case("no_tokens", lambda t, g: codes(t, g, 0, 3, 11, 8)),
        Case("no_latents", lambda t, g: codes(t, g, 4, 0, 11, 8)),
        Case("no_dictionary", lambda t, g: codes(t, g, 4, 2, 0, 8)),
        Case("huge", lambda t, g: codes(t, g, 6, 1, 11, 8, scale=1e37), float32),
        Case("tiny", lambda t, g: codes(t, g, 6, 4, 11, 8, scale=1e-36), float32),
    ]
