"""Sparse mixture of experts on the GPU in four launches; nothing waits for the device, all sizes follow from shapes.

1. `sort_experts` (CUDA C++): rows sorted by expert, in blocks of one expert each.
2. `up_kernel`: gathers tokens as it loads them, multiplies with gate and up in one program, and stores act(gate) * up
   in the dtype of x (as any product in 16 bits takes it: beyond 65504 a float16 hidden value is infinite).
3. `down_kernel`: the second product; every row is written where it stood before sorting, in float32, by one program.
4. `combine_kernel`: the sum over a token's experts, in order. No atomics: equal inputs give equal bits.

While an expert has few rows the weights are all the traffic: blocks of 16 or 32 rows, products transposed so that the
weights fill the tensor cores' 64 lines, and, where there are fewer programs than the device holds, the sum over hidden
channels split into parts that step 4 adds in order. Block size and splits follow from the number of tokens, so another
batch size may change last bits; the other tokens' values never do.

Workspace: T * k rows of F (in whole blocks) in the dtype of x, splits * T * k rows of D_out in float32, row lists.
"""

from dataclasses import dataclass

import torch
import triton

from planmill.kernels.common.sizes import tuned_for
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, SHARED_LIMIT, StaticKernel
from planmill.kernels.common.triton_match import capability_of, processors
from planmill.kernels.routing.expert_mixture._cuda import Blocks, sort_experts
from planmill.kernels.routing.expert_mixture._triton_kernels import combine_kernel, down_kernel, up_kernel

GROUP = 8  # blocks between which the block changes fastest
BLOCK_C = 512  # columns that one program of combine_kernel sums
SHORTEST_RUN = 256  # hidden channels of a split, at least


@dataclass(frozen=True)
class Tile:
    """Choices of a product: columns with a gate (and as many that it multiplies) and without, channels of a step."""

    gated: int
    plain: int
    depth: int
    warps: int
    stages: int
    swap: bool


# By rows of a block. sm_90 multiplies from shared memory; elsewhere operands pass through registers, and wider tiles
# spill. float32 goes through the ordinary units, whose precision is the CPU's.
HOPPER = {
    16: Tile(64, 64, 128, 4, 3, swap=True),
    32: Tile(64, 64, 64, 4, 4, swap=True),
    64: Tile(64, 128, 64, 4, 3, swap=False),
    128: Tile(128, 128, 64, 8, 3, swap=False),
}
HALF = {
    16: Tile(64, 64, 64, 4, 4, swap=True),
    32: Tile(64, 64, 64, 4, 4, swap=True),
    64: Tile(64, 64, 64, 4, 3, swap=False),
    128: Tile(64, 128, 64, 8, 3, swap=False),
}
FULL = {
    16: Tile(32, 32, 64, 4, 3, swap=True),
    32: Tile(32, 32, 64, 4, 3, swap=True),
    64: Tile(32, 32, 32, 8, 3, swap=False),
}


def rows_of_block(rows: int, experts: int, dtype: torch.dtype) -> int:
    """The smallest block that holds an expert's rows on average; the largest there is, where none does."""
    sizes = FULL if dtype == torch.float32 else HALF
    return next((size for size in sizes if rows <= size * experts), max(sizes))


def shared_limit(capability: int) -> int:
    """Bytes of shared memory a block may have; what is not known has at least as much as sm_120."""
    return SHARED_LIMIT.get(capability, SHARED_LIMIT[90] if 90 < capability < 120 else SHARED_LIMIT[120])


def choose_tile(dtype: torch.dtype, size: int, gated: bool, capability: int) -> tuple[dict, dict]:
    """(constexpr arguments, launch options) of a product with blocks of `size` rows."""
    full = dtype == torch.float32
    tile = (FULL if full else HOPPER if capability == 90 else HALF)[size]
    columns = tile.gated if gated else tile.plain
    step = (size + columns * (1 + gated)) * tile.depth * (4 if full else 2)
    stages = max(1, min(tile.stages, (shared_limit(capability) - 2048) // step))
    constants = {"SWAP": tile.swap, "GROUP": GROUP, "BLOCK_M": size, "BLOCK_N": columns, "BLOCK_K": tile.depth}
    return constants, {"num_warps": tile.warps, "num_stages": stages}


def split_hidden(blocks: int, tiles: int, hidden: int, depth: int, wanted: int) -> tuple[int, int]:
    """(splits, hidden channels of a split, a multiple of `depth`) so that about `wanted` programs run."""
    most = max(1, hidden // max(depth, SHORTEST_RUN))
    splits = min(most, max(1, wanted // max(1, blocks * tiles)))
    run = triton.cdiv(triton.cdiv(max(hidden, 1), splits), depth) * depth
    return triton.cdiv(max(hidden, 1), run), run


def _strides(bias: torch.Tensor) -> tuple[int, ...]:
    return bias.stride() if bias.numel() else (0, 0)


def _up(
    x: torch.Tensor, weights: torch.Tensor, fanout: int, up: torch.Tensor, bias: torch.Tensor, hidden: int,
    blocks: Blocks, activation: str, scale: bool,
) -> torch.Tensor:  # fmt: skip
    """The hidden rows [places, F], sorted."""
    gated, width = up.shape[1] != hidden, x.shape[1]
    out = torch.empty(blocks.bound * blocks.size, hidden, dtype=x.dtype, device=x.device)
    constants, options = choose_tile(x.dtype, blocks.size, gated, capability_of(x))
    tiles = triton.cdiv(hidden, constants["BLOCK_N"])
    if tiles:
        up_kernel[(blocks.bound * tiles,)](
            x, weights, up, bias, blocks.rows, blocks.expert, blocks.count, out, weights.numel(), fanout, width, hidden,
            tiles, *x.stride(), *up.stride(), *_strides(bias), ACTIVATION=activation, GATED=gated,
            BIAS=bias.numel() > 0, SCALE=scale, EVEN_K=width % constants["BLOCK_K"] == 0, **constants, **options,
        )  # fmt: skip
    return out


def _down(hidden: torch.Tensor, rows: int, down: torch.Tensor, bias: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """The experts' results [splits, T * k, D_out], rows as they stood before sorting; dropped ones are not written."""
    columns, channels = down.shape[1:]
    constants, options = choose_tile(down.dtype, blocks.size, False, capability_of(down))
    depth, tiles = constants["BLOCK_K"], triton.cdiv(columns, constants["BLOCK_N"])
    tuned = tuned_for(rows)
    expected = max(min(tuned, down.shape[0]), tuned // blocks.size)
    splits, run = split_hidden(expected, tiles, channels, depth, 2 * processors(down))
    out = torch.empty(splits, rows, columns, dtype=torch.float32, device=down.device)
    down_kernel[(blocks.bound * tiles, splits)](
        hidden, down, bias, blocks.rows, blocks.expert, blocks.count, out, rows, channels, columns, tiles, run,
        *down.stride(), *_strides(bias), BIAS=bias.numel() > 0, EVEN_K=channels % depth == 0, **constants, **options,
    )  # fmt: skip
    return out


def launch(
    x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, up: torch.Tensor, up_bias: torch.Tensor,
    down: torch.Tensor, down_bias: torch.Tensor, activation: str, weight_on_input: bool,
) -> torch.Tensor:  # fmt: skip
    """The mixture [T, D_out] of the dtype of x; the contract is that of `mix_experts`."""
    (tokens, fanout), (experts, columns, hidden) = indices.shape, down.shape
    out = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    if fanout == 0 or experts == 0:
        return out.zero_()
    indices, weights = indices.contiguous(), weights.contiguous()
    with torch.cuda.device_of(x):
        blocks = sort_experts(indices, experts, rows_of_block(tuned_for(indices.numel()), experts, x.dtype))
        rows = _up(x, weights, fanout, up, up_bias, hidden, blocks, activation, weight_on_input)
        parts = _down(rows, indices.numel(), down, down_bias, blocks)
        combine_kernel[(tokens, triton.cdiv(columns, BLOCK_C))](
            parts, indices, weights, out, fanout, experts, columns, parts.shape[0], indices.numel(),
            SCALE=not weight_on_input, BLOCK_C=BLOCK_C, num_warps=4,
        )  # fmt: skip
    return out


def _static() -> list[StaticKernel]:
    """Every tile; with what takes registers (erf, bias, weight, remainder) and once in each form without."""
    made = []
    lists = {"row_ptr": "*i32", "expert_ptr": "*i32", "count_ptr": "*i32", "weight_ptr": "*fp32"}
    for name, dtype, size, gated, bare, second in (
        ("*bf16", torch.bfloat16, 16, True, True, True), ("*fp16", torch.float16, 16, False, False, False),
        ("*bf16", torch.bfloat16, 32, True, False, True), ("*bf16", torch.bfloat16, 64, True, False, False),
        ("*bf16", torch.bfloat16, 64, False, False, True), ("*bf16", torch.bfloat16, 128, True, False, False),
        ("*bf16", torch.bfloat16, 128, False, True, True), ("*fp32", torch.float32, 16, True, False, True),
        ("*fp32", torch.float32, 32, True, False, True), ("*fp32", torch.float32, 64, True, False, True),
    ):  # fmt: skip
        half = dtype != torch.float32
        for target in PRODUCT_TARGETS if half else PRODUCT_TARGETS[:2]:
            constants, options = choose_tile(dtype, size, gated, target)
            own = {"ACTIVATION": "silu" if bare else "gelu", "GATED": gated, "BIAS": not bare, "SCALE": not bare,
                   "EVEN_K": bare, "stride_x_d": 1, "stride_up_d": 1, "stride_bias_f": 1}  # fmt: skip
            data = dict.fromkeys(("x_ptr", "up_ptr", "bias_ptr", "out_ptr"), name)
            made.append(StaticKernel(
                up_kernel, {**lists, **data}, constants={**constants, **own}, aligned=("width", "hidden"),
                tensor_core=half, targets=(target,), **options,
            ))  # fmt: skip
            if not second:
                continue
            constants, options = choose_tile(dtype, size, False, target)
            own = {"BIAS": not bare, "EVEN_K": bare, "stride_down_f": 1, "stride_bias_o": 1}
            data = dict.fromkeys(("hidden_ptr", "down_ptr", "bias_ptr"), name)
            made.append(StaticKernel(
                down_kernel, {**lists, **data}, constants={**constants, **own}, aligned=("hidden", "columns", "run"),
                tensor_core=half, targets=(target,), **options,
            ))  # fmt: skip
    for scale in (True, False):
        pointers = {"index_ptr": "*i32", "out_ptr": "*bf16" if scale else "*fp32"}
        constants = {"SCALE": scale, "BLOCK_C": BLOCK_C}
        made.append(StaticKernel(combine_kernel, pointers, constants=constants, aligned=("columns",)))
    return made


STATIC = _static()
