"""hash_embedding: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.common.checks import check_choice, check_device, check_dtype, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec
from planmill.kernels.routing.hash_embedding.cases import cases
from planmill.kernels.routing.hash_embedding.reference import hash_embedding_reference, hash_rows

POOLINGS = ("sum", "mean")


def backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Dense gradients of the table and of the weights."""
    values, lengths, weights, table, seeds, features, mean = args
    chosen = features.long()
    v = values[:, chosen]
    most = v.shape[2]
    gradient = grads[0].float().view(*v.shape[:2], table.shape[1])
    count = lengths[:, chosen].clamp(0, most) if lengths.numel() else torch.full_like(v[..., 0], most)
    used = torch.arange(most, device=v.device) < count[..., None]
    if mean:
        gradient = gradient / count.clamp_min(1)[..., None]
    rows = hash_rows(v, seeds[:, None], table.shape[0])
    share = torch.where(used[..., None], gradient[:, :, None], 0)  # [B, J, L, d]
    for_weights = torch.zeros_like(weights)
    if weights.numel():
        for_values = (share * table[rows].float()).sum(3)
        for_weights = for_weights.index_add(1, chosen, torch.where(used, for_values, 0))
        share = share * weights[:, chosen][..., None]
    for_table = torch.zeros(table.shape, dtype=torch.float32, device=table.device)
    for_table = for_table.index_add(0, rows.flatten(), share.flatten(0, 2)).to(table.dtype)
    return None, None, for_weights, for_table, None, None, None


SPEC = OpSpec(
    schema="hash_embedding(Tensor values, Tensor lengths, Tensor weights, Tensor table, Tensor seeds, "
    "Tensor features, bool mean) -> Tensor",
    outputs=lambda values, lengths, weights, table, seeds, features, mean: [
        ((values.shape[0], seeds.shape[0] * table.shape[1]), table.dtype)
    ],
    reference=hash_embedding_reference,
    portable="portable:hash_embedding_portable",
    cases=cases,
    backward=backward,
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 8e-3), torch.float16: (2e-3, 2e-3)},
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def _check_integers(name: str, x: torch.Tensor, dtype: torch.dtype, rank: int, layout: str) -> None:
    check_rank("hash_embedding", name, x, rank, layout)
    check_dtype("hash_embedding", name, x, dtype)


def _check(
    values: torch.Tensor, table: torch.Tensor, seeds: torch.Tensor, features: torch.Tensor,
    lengths: torch.Tensor | None, weights: torch.Tensor | None,
) -> None:  # fmt: skip
    op = "hash_embedding"
    check_rank(op, "table", table, 2, "[M, d]")
    check_float(op, "table", table)
    if not 1 <= table.shape[0] < 2**31:
        raise ValueError(f"{op}: table must have from 1 to 2^31 - 1 rows, got {table.shape[0]}")
    _check_integers("values", values, torch.int64, 3, "[B, F] or [B, F, L]")
    _check_integers("seeds", seeds, torch.int64, 1, "[J]")
    _check_integers("features", features, torch.int32, 1, "[J]")
    if features.shape != seeds.shape:
        raise ValueError(f"{op}: features must be [{seeds.shape[0]}] like seeds, got {list(features.shape)}")
    if not is_compiling() and values.shape[0] * seeds.shape[0] >= 2**31:
        raise ValueError(
            f"{op}: values and seeds must make fewer than 2^31 lookups, got {values.shape[0]} x {seeds.shape[0]}"
        )
    if lengths is not None:
        _check_integers("lengths", lengths, torch.int32, 2, "[B, F]")
        if lengths.shape != values.shape[:2]:
            raise ValueError(f"{op}: lengths must be {list(values.shape[:2])} like values, got {list(lengths.shape)}")
    if weights is not None:
        check_dtype(op, "weights", weights, torch.float32)
        if weights.shape != values.shape:
            raise ValueError(f"{op}: weights must be {list(values.shape)} like values, got {list(weights.shape)}")
    for name, x in (("values", values), ("seeds", seeds), ("features", features), ("lengths", lengths),
                    ("weights", weights)):  # fmt: skip
        if x is not None:
            check_device(op, name, x, "table", table)
    if features.device.type == "cpu" and not is_compiling() and features.numel():
        low, high = features.aminmax()
        if int(low) < 0 or int(high) >= values.shape[1]:
            raise ValueError(f"{op}: features must be from 0 to {values.shape[1] - 1}, got {int(low)} to {int(high)}")


def embed_hashed(
    values: torch.Tensor,
    table: torch.Tensor,
    seeds: torch.Tensor,
    features: torch.Tensor,
    *,
    lengths: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    pooling: str = "sum",
) -> torch.Tensor:
    """Look up many features in one shared table, each lookup by a hash of its own; results stand side by side.

    `y[b, j] = pool over l of weights[b, f, l] * table[h_j(values[b, f, l])]` with `f = features[j]`; a feature that
    needs more width has several lookups. `h_j(v) = floor(mix(mix(v) ^ seeds[j]) * M / 2^64)`, all unsigned: `mix` is
    the finaliser of SplitMix64, and the multiply-shift spreads 2^64 hashes over M rows evenly to one part in 2^33.

    Args:
        values: [B, F] or [B, F, L], int64: one value per feature, or up to L. Every 64-bit number is a legal value;
            there is no vocabulary.
        table: [M, d], float32, bfloat16 or float16, M < 2^31.
        seeds: [J] int64, one for each lookup, any numbers; lookups of equal seeds have equal hashes.
        features: [J] int32 from 0 to F - 1: the feature that each lookup reads.
        lengths: [B, F] int32: how many of the L values there are, from the first on; None: all. Others are not read.
        weights: shape of `values`, float32; None: all one.
        pooling: "sum" or "mean"; a mean divides by the number of values, whatever their weights.

    Returns:
        [B, J * d], dtype of the table; sums in float32, in the order of the values. A feature without values gives
            zeros.

    Differentiable with respect to the table (a dense gradient, float32 sums) and to the weights.

    Raises:
        ValueError: wrong rank or shape, an empty table, another device, features out of range (checked on the CPU),
            an unknown pooling.
        TypeError: another dtype.

    Source: Unified Embedding (Coleman et al., NeurIPS 2023), feature multiplexing. The paper leaves the hash open; the
    one here is ours, and so is the meaning of a weighted mean.
    """
    check_choice("hash_embedding", "pooling", pooling, POOLINGS)
    if values.dim() == 2:
        values = values[..., None]
        weights = weights if weights is None or weights.dim() != 2 else weights[..., None]
    _check(values, table, seeds, features, lengths, weights)
    if lengths is None:
        lengths = torch.empty(0, dtype=torch.int32, device=table.device)
    if weights is None:
        weights = torch.empty(0, dtype=torch.float32, device=table.device)
    call = _op if is_compiling() else _call
    return call(values, lengths, weights, table, seeds, features, pooling == "mean")
