"""The k largest active latents on the GPU in four launches: two walks over tiles of scores, and a bound between them.

1. `group_kernel`: scores of a tile by `tl.dot` in float32 (tensor cores for half-precision inputs, IEEE float32
   otherwise: the inputs may hold infinities, which a split into parts would lose), largest key of each 16 latents.
2. `bound_kernel`: the k-th largest of these. Keys are unique, so exactly k groups reach it, and what reaches it is at
   most 16 k latents: no list can overflow.
3. `filter_kernel`: the same tiles again, to the same bits; what reaches the bound is listed.
4. `select_kernel`: the k largest of the list, sorted.

Memory beyond inputs and outputs: M / 16 + 16 k keys of 8 bytes per token of a slab, 24 MiB in all; more tokens are more
slabs of four launches. Nothing waits for the device: a call can be captured in a CUDA graph.
"""

import torch
import triton

from planmill.kernels.common.sizes import slabs, tuned_for
from planmill.kernels.common.triton_checks import StaticKernel
from planmill.kernels.common.triton_match import processors
from planmill.kernels.routing.sparse_encoding._triton_kernels import (
    bound_kernel,
    filter_kernel,
    group_kernel,
    select_kernel,
)

BLOCK_T, BLOCK_N, BLOCK_D, GROUP = 64, 64, 32, 16
NUM_WARPS, NUM_STAGES = 8, 3
SCAN = 1024  # keys that one step of a bisection holds
SLAB_BYTES = 24 << 20
MODES = {"topk": 0, "abs_topk": 1, "jump_relu": 2}


def launch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, threshold: torch.Tensor, k: int, mode: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values and indices [T, k], counts [T]; the contract is that of `encode_sparsely`."""
    (tokens, channels), latents, device = x.shape, weight.shape[0], x.device
    with torch.cuda.device_of(x):
        values = torch.empty(tokens, k, dtype=torch.float32, device=device)
        indices = torch.empty(tokens, k, dtype=torch.int32, device=device)
        counts = torch.empty(tokens, dtype=torch.int32, device=device)
        if tokens == 0 or latents == 0:
            return values.zero_(), indices.fill_(-1), counts.zero_()
        groups, slots, sorted_keys = triton.cdiv(latents, GROUP), min(latents, GROUP * k), triton.next_power_of_2(k)
        width = slots + sorted_keys
        slab = min(tokens, max(BLOCK_T, SLAB_BYTES // (8 * (groups + width + 1)) // BLOCK_T * BLOCK_T))
        table, slot = (torch.empty(slab, n, dtype=torch.int64, device=device) for n in (groups, width))
        bound = torch.empty(slab, dtype=torch.int64, device=device)
        active, known, stored = (torch.zeros(tokens, dtype=torch.int32, device=device) for _ in range(3))
        given = (x, weight, bias.contiguous(), threshold.contiguous())
        strides = (*x.stride(), *weight.stride())
        options = {"MODE": MODES[mode], "HAS_BIAS": bias.shape[0] > 0, "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N,
                   "BLOCK_D": BLOCK_D, "num_warps": NUM_WARPS, "num_stages": NUM_STAGES}  # fmt: skip
        for first, rows in slabs(tokens, slab):
            row_tiles = triton.cdiv(rows, BLOCK_T)
            splits = min(triton.cdiv(latents, BLOCK_N), max(1, 4 * processors(x) // tuned_for(row_tiles)))
            grid = (row_tiles * splits,)
            group_kernel[grid](
                *given, table, active, known, first, rows, latents, channels, groups, splits, *strides, GROUP=GROUP,
                **options,
            )  # fmt: skip
            bound_kernel[(rows,)](table, bound, groups, k, SCAN=SCAN, num_warps=4)
            filter_kernel[grid](
                *given, bound, stored, slot, first, rows, latents, channels, slots, width, splits, *strides, **options
            )
            select_kernel[(rows,)](
                active, known, stored, slot, values, indices, counts, first, latents, slots, width, k,
                MODE=MODES[mode], BLOCK_S=sorted_keys, SCAN=SCAN, num_warps=4,
            )  # fmt: skip
    return values, indices, counts


def _static_walks() -> list[StaticKernel]:
    unit = {"x_stride_d": 1, "stride_d": 1, "BLOCK_T": BLOCK_T, "BLOCK_N": BLOCK_N, "BLOCK_D": BLOCK_D}
    integers = {"table_ptr": "*i64", "active_ptr": "*i32", "known_ptr": "*i32", "bound_ptr": "*i64",
                "stored_ptr": "*i32", "slot_ptr": "*i64"}  # fmt: skip
    made = []
    for kind, mode in (("*fp32", 0), ("*bf16", 0), ("*fp32", 1), ("*bf16", 2)):
        floats = dict.fromkeys(("x_ptr", "weight_ptr", "bias_ptr", "theta_ptr"), kind)
        for kernel, own in ((group_kernel, {"GROUP": GROUP}), (filter_kernel, {})):
            made.append(
                StaticKernel(
                    kernel,
                    pointers={**floats, **integers},
                    constants={**unit, **own, "MODE": mode, "HAS_BIAS": True},
                    num_warps=NUM_WARPS,
                    num_stages=NUM_STAGES,
                    tensor_core=kind != "*fp32",
                )
            )
    return made


def _static_selection() -> list[StaticKernel]:
    state = dict.fromkeys(("active_ptr", "known_ptr", "stored_ptr", "index_ptr", "count_ptr"), "*i32")
    bound = StaticKernel(bound_kernel, {"table_ptr": "*i64", "bound_ptr": "*i64"}, constants={"SCAN": SCAN})
    return [bound] + [
        StaticKernel(
            select_kernel,
            pointers={**state, "slot_ptr": "*i64"},
            constants={"MODE": mode, "BLOCK_S": size, "SCAN": SCAN},
        )
        for mode, size in ((0, 32), (2, 128))
    ]


STATIC = [*_static_walks(), *_static_selection()]
