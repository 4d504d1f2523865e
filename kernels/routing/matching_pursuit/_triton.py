"""Matching pursuit on the GPU: per step the search of segmented_max, exact in float32, then one pass over the residual.

The dictionary is encoded once (hi + lo float16) and multiplied with the residuals' encoding on the tensor cores, with
the maximum in the epilogue: no [T, M] tensor. Nothing waits for the device: K steps are 3 K launches of fixed grids.
"""

import torch
import triton
import triton.language as tl

from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import Match, encode_database, match_segments

BLOCK_C = 256


@triton.jit(do_not_specialize=["step", "steps"])
def subtract_kernel(
    residual_ptr, dictionary_ptr, best_ptr, where_ptr, values_ptr, indices_ptr, step, steps, channels,
    stride_m, stride_c, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Token `program_id(0)`: residual -= value * atom; the value and the index of this step. -1: nothing matched."""
    token = tl.program_id(0).to(tl.int64)
    index = tl.load(where_ptr + token)
    value = tl.where(index >= 0, tl.load(best_ptr + token), float("nan"))
    tl.store(values_ptr + token * steps + step, value)
    tl.store(indices_ptr + token * steps + step, index)
    limit = tl.where(index >= 0, channels, 0)
    for begin in range(0, channels, BLOCK_C):
        o_c = begin + tl.arange(0, BLOCK_C)
        m_c = o_c < limit
        p_atom = dictionary_ptr + index.to(tl.int64) * stride_m + o_c.to(tl.int64) * stride_c
        p_residual = residual_ptr + token * channels + o_c
        atom = tl.load(p_atom, mask=m_c, other=0.0).to(tl.float32)
        tl.store(p_residual, tl.load(p_residual, mask=m_c, other=0.0) - value * atom, mask=m_c)


def launch(x: torch.Tensor, dictionary: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [T, K] float32, indices [T, K] int32 and residual [T, D] float32; the contract of `pursue_matches`."""
    (tokens, channels), atoms, device = x.shape, dictionary.shape[0], x.device
    with torch.cuda.device_of(x):
        residual = torch.empty(tokens, channels, dtype=torch.float32, device=device)
        residual.copy_(x)
        values = torch.empty(tokens, steps, dtype=torch.float32, device=device)
        indices = torch.empty(tokens, steps, dtype=torch.int32, device=device)
        if tokens == 0 or atoms == 0 or steps == 0:
            return values.fill_(torch.nan), indices.fill_(-1), residual
        best = torch.empty(tokens, 1, dtype=torch.float32, device=device)
        where = torch.empty(tokens, 1, dtype=torch.int32, device=device)
        offsets = torch.arange(2, dtype=torch.int32, device=device) * atoms
        match = Match(residual[None], dictionary[None], offsets, exact=True, dot=True)
        encoded = encode_database(match)
        for step in range(steps):
            match_segments(match, best, where, equal_segments=False, encoded=encoded)
            subtract_kernel[(tokens,)](
                residual, dictionary, best, where, values, indices, step, steps, channels, *dictionary.stride(),
                BLOCK_C=BLOCK_C, num_warps=4,
            )  # fmt: skip
    return values, indices, residual


STATIC = [
    StaticKernel(
        subtract_kernel,
        pointers={"dictionary_ptr": dtype, "where_ptr": "*i32", "indices_ptr": "*i32"},
        constants={"BLOCK_C": BLOCK_C, "stride_c": 1},
    )
    for dtype in ("*fp32", "*bf16")
]
