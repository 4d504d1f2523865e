"""Launching the search: sizes, workspace, and the choices that ship. See `triton_search` for what the kernels do."""

from dataclasses import dataclass

import torch
import triton

from planmill.kernels.common.sizes import slabs, tuned_for
from planmill.kernels.common.triton_checks import PRODUCT_TARGETS, StaticKernel
from planmill.kernels.common.triton_screen import BLOCK_K, Encoded, Frame, as_images, choose_frame, encode
from planmill.kernels.common.triton_search import search_kernel, settle_kernel

BLOCK_M, NUM_WARPS, NUM_STAGES = 128, 8, 3
SETTLE_ROWS, SETTLE_C, SETTLE_Q = 16, 64, 32
WORKSPACE_BYTES = 32 << 20  # of the partial minima; pairs are visited in runs that fit


def columns_of_tile(exact: bool, radius: bool, capability: int = 90) -> int:
    """BLOCK_N: indices, second minima and grid positions of 128 columns do not fit the registers beside the tile.

    On sm_120 (no wgmma: operands pass through registers) not even their ranks do.
    """
    return 64 if exact or radius or capability >= 100 else 128


def settle_warps(*, symmetric: bool, indices: bool, dot: bool) -> int:
    """Where indices are kept beside rows and columns, or beside distances, four warps have too few registers."""
    return 8 if indices and (symmetric or not dot) else 4


def capability_of(x: torch.Tensor) -> int:
    """90 for sm_90; also where the interpreter stands in for a device."""
    if not x.is_cuda:
        return 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return major * 10 + minor


@dataclass(frozen=True)
class Match:
    """What `match_segments` searches: rows [N, P, C] against segments `offsets` [S + 1] of a database [M, Q, C].

    Args:
        exact: the result is that of float32 arithmetic; otherwise of products of rows rounded to 11 bits.
        dot: largest inner product instead of smallest distance.
        symmetric: the database is `rows` and segments are its images; an image is not matched with itself.
        radius2: a row matches patches of the grid at most sqrt(radius2) away; -1: all.
        grid_width: patches per line of the grid.
    """

    rows: torch.Tensor
    database: torch.Tensor
    offsets: torch.Tensor
    exact: bool
    dot: bool = False
    symmetric: bool = False
    radius2: int = -1
    grid_width: int = 1

    @property
    def segments(self) -> int:
        """Number of segments."""
        return self.offsets.shape[0] - 1

    @property
    def pairs(self) -> int:
        """Number of pairs of an image and a segment that are visited."""
        images = self.rows.shape[0]
        return images * (images - 1) // 2 if self.symmetric else images * self.segments


def processors(x: torch.Tensor) -> int:
    """Multiprocessors of the device of x; 4 where the interpreter stands in for one."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def bounds(y: Encoded, segments: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Largest length and residual of each segment where all are of one size, else of all rows; and the step between."""
    rows = y.length.shape[0]
    if segments and rows % segments == 0 and segments > 1 and rows:
        return y.length.view(segments, -1).amax(1), y.residual.view(segments, -1).amax(1), 1
    return y.length.amax(0, keepdim=True), y.residual.amax(0, keepdim=True), 0


def encode_database(match: Match) -> tuple[Frame, Encoded]:
    """The database as `match_segments` searches it."""
    database = as_images(match.database)
    frame = choose_frame(database, centred=not match.dot)
    split = match.exact and match.rows.dtype == torch.float32
    return frame, encode(database, frame, split=split, norms=not match.dot)


def match_segments(
    match: Match,
    out: torch.Tensor,
    out_where: torch.Tensor | None,
    *,
    equal_segments: bool = True,
    encoded: tuple[Frame, Encoded] | None = None,
) -> None:
    """Write distances (or inner products) [N * P, S] to `out`, rows of the database to `out_where`.

    `encoded`: what `encode_database` returned, where a database is searched more than once.
    Segment j has no entry for image i = j of a symmetric search: `out` is not written there.
    """
    rows = as_images(match.rows)
    frame, y = encoded or encode_database(match)
    x = y if match.symmetric else encode(rows, frame, split=y.split, norms=not match.dot)
    patches = rows.shape[1]
    row_tiles = triton.cdiv(patches, BLOCK_M)
    # Without a radius and with few programs, the columns are split too; a symmetric search has enough pairs.
    splits = (
        1 if match.symmetric else min(32, max(1, 2 * processors(rows) // max(1, tuned_for(match.pairs * row_tiles))))
    )
    slots = splits + row_tiles * match.symmetric
    run = max(1, WORKSPACE_BYTES // (slots * patches * (12 if match.exact else 4)))
    run = min(run, match.pairs)
    best = torch.empty(run * slots * patches, dtype=torch.float32, device=rows.device)
    second = torch.empty_like(best) if match.exact else best
    where = torch.empty(best.shape, dtype=torch.int32, device=rows.device) if match.exact else best
    scratch = (best, where, second)
    for first, count in slabs(match.pairs, run):
        if match.symmetric and match.radius2 >= 0:  # tiles out of the band are not visited
            best.fill_(torch.inf)
        _search(match, x, y, scratch, first, count, splits)
        _settle(match, frame, x, y, scratch, first, count, splits, equal_segments, out, out_where)


def _search(match: Match, x: Encoded, y: Encoded, scratch: tuple, first: int, count: int, splits: int) -> None:
    images, patches, _ = match.rows.shape
    row_tiles = triton.cdiv(patches, BLOCK_M)
    radius = int(max(match.radius2, 0) ** 0.5) + 1
    search_kernel[(count * row_tiles * splits,)](
        x.hi, x.lo, x.half_norm, x.descale, y.hi, y.lo, y.half_norm, y.descale, match.offsets, *scratch,
        first, images, patches, match.segments, row_tiles, splits, x.k_tiles, match.radius2, radius, match.grid_width,
        SPLIT=x.split, EXACT=match.exact, SYMMETRIC=match.symmetric, RADIUS=match.radius2 >= 0,
        BLOCK_M=BLOCK_M, BLOCK_N=columns_of_tile(match.exact, match.radius2 >= 0, capability_of(match.rows)),
        BLOCK_K=BLOCK_K[x.split], num_warps=NUM_WARPS, num_stages=NUM_STAGES,
    )  # fmt: skip


def _settle(
    match: Match, frame: Frame, x: Encoded, y: Encoded, scratch: tuple, first: int, count: int, splits: int,
    equal_segments: bool, out: torch.Tensor, out_where: torch.Tensor | None,
) -> None:  # fmt: skip
    images, patches, channels = match.rows.shape
    longest, roughest, step = bounds(y, match.segments if equal_segments else 0)
    blocks = triton.cdiv(patches, SETTLE_ROWS)
    settle_kernel[(count * blocks * (2 if match.symmetric else 1),)](
        match.rows, match.database, frame.unit, x.half_norm, x.length, x.residual, y.half_norm, longest, roughest,
        match.offsets, *scratch, out, out if out_where is None else out_where,
        first, images, patches, match.segments, match.database.shape[1], channels, triton.cdiv(patches, BLOCK_M),
        splits, blocks, step, y.rounding, match.radius2, match.grid_width,
        *match.rows.stride(), *match.database.stride(),
        EXACT=match.exact, SYMMETRIC=match.symmetric, RADIUS=match.radius2 >= 0, DOT=match.dot,
        INDICES=out_where is not None, BLOCK_R=SETTLE_ROWS, BLOCK_C=SETTLE_C, BLOCK_Q=SETTLE_Q,
        num_warps=settle_warps(symmetric=match.symmetric, indices=out_where is not None, dot=match.dot),
    )  # fmt: skip


def _static_search() -> list[StaticKernel]:
    halves = {name: "*fp16" for name in ("x_hi_ptr", "x_lo_ptr", "y_hi_ptr", "y_lo_ptr")}
    indices = {"offsets_ptr": "*i32", "where_ptr": "*i32"}
    # symmetric exact float32; symmetric 11 bits; bank 11 bits, also with a radius; segmented float32 and half;
    # symmetric exact float32 with a radius
    modes = [(True, True, True, False), (False, False, True, False), (False, False, False, False),
             (False, False, False, True), (True, True, False, False), (False, True, False, False),
             (True, True, True, True)]  # fmt: skip
    return [
        StaticKernel(
            search_kernel,
            pointers={**halves, **indices},
            constants={"SPLIT": split, "EXACT": exact, "SYMMETRIC": symmetric, "RADIUS": radius,
                       "BLOCK_M": BLOCK_M, "BLOCK_N": columns_of_tile(exact, radius, targets[0]),
                       "BLOCK_K": BLOCK_K[split]},
            num_warps=NUM_WARPS,
            num_stages=NUM_STAGES,
            tensor_core=True,
            targets=targets,
        )
        for targets in (PRODUCT_TARGETS[:2], PRODUCT_TARGETS[2:])
        for split, exact, symmetric, radius in modes
    ]  # fmt: skip


def _static_settle() -> list[StaticKernel]:
    indices = {"offsets_ptr": "*i32", "where_ptr": "*i32", "out_where_ptr": "*i32"}
    tile = {"BLOCK_R": SETTLE_ROWS, "BLOCK_C": SETTLE_C, "BLOCK_Q": SETTLE_Q, "x_stride_c": 1, "y_stride_c": 1}
    modes = [
        ("*fp32", True, True, True, False),
        ("*bf16", True, False, False, True),
        ("*bf16", False, True, False, False),
    ]
    return [
        StaticKernel(
            settle_kernel,
            pointers={**indices, "x_ptr": dtype, "y_ptr": dtype},
            scalars={"rounding": "fp32"},
            constants={"EXACT": exact, "SYMMETRIC": symmetric, "RADIUS": radius, "DOT": dot, "INDICES": dot, **tile},
        )
        for dtype, exact, symmetric, radius, dot in modes
    ]


STATIC = [*_static_search(), *_static_settle()]
