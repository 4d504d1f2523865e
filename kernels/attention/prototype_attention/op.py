"""prototype_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.prototype_attention.cases import cases
from planmill.kernels.attention.prototype_attention.reference import prototype_attention_reference
from planmill.kernels.common.checks import check_alike, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="prototype_attention(Tensor q, Tensor keys, Tensor table, Tensor tau, Tensor bias) -> Tensor",
    outputs=lambda q, keys, table, tau, bias: [((q.shape[0], q.shape[1], table.shape[2]), q.dtype)],
    reference=prototype_attention_reference,
    cases=cases,
    tolerances={torch.float32: (2e-5, 2e-5), torch.bfloat16: (2e-2, 2e-2), torch.float16: (2e-3, 2e-3)},
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)


def mix_prototypes(
    q: torch.Tensor, keys: torch.Tensor, table: torch.Tensor, tau: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """What tokens take from a few prototypes, by cosine, without normalising over them.

    a[b, n, h, m] = relu(tau_h <q[b, n, h], k[b, h, m]>) of q and k at unit length (over max(length, 1e-12))
    out[b, n] = bias + sum over h and m of a[b, n, h, m] table[b, h M + m]

    `table` holds the values after the output projection, Wo_h v_hm: it is made once for all tokens and saves them
    that projection (see `PrototypeAttention`). A token with no positive weight gets the bias.

    Args:
        q: [B, N, H, d], float16, bfloat16 or float32, any strides; d at least 1, lengths below 1e19.
        keys: [B, H, M, d], as q.
        table: [B, H M, C], as q.
        tau: [H], as q, of either sign.
        bias: [C], as q.

    Returns:
        [B, N, C], dtype of q, computed in float32 on the CPU. A NaN in q makes its token NaN, in the keys its sample.

    Raises:
        ValueError: wrong rank or shape, another device.
        TypeError: another dtype.

    Source: Luo et al., "Exploring intrinsic normal prototypes within a single image for universal anomaly detection"
    (INP-Former, CVPR 2025), section 3.3; the folded projection is ours.
    """
    op = "prototype_attention"
    check_rank(op, "q", q, 4, "[B, N, H, d]")
    check_float(op, "q", q)
    batch, _, heads, d = q.shape
    if d == 0:
        raise ValueError(f"{op}: q must be [B, N, H, d] with d at least 1, got {list(q.shape)}")
    check_rank(op, "keys", keys, 4, "[B, H, M, d]")
    check_rank(op, "table", table, 3, "[B, H M, C]")
    if keys.shape[0] != batch or keys.shape[1] != heads or keys.shape[3] != d:
        raise ValueError(f"{op}: keys must be [{batch}, {heads}, M, {d}] like q, got {list(keys.shape)}")
    rows = heads * keys.shape[2]
    if table.shape[0] != batch or table.shape[1] != rows:
        raise ValueError(f"{op}: table must be [{batch}, {rows}, C] like keys, got {list(table.shape)}")
    if tau.dim() != 1 or tau.shape[0] != heads:
        raise ValueError(f"{op}: tau must be [{heads}], got {list(tau.shape)}")
    if bias.dim() != 1 or bias.shape[0] != table.shape[2]:
        raise ValueError(f"{op}: bias must be [{table.shape[2]}] like table, got {list(bias.shape)}")
    for name, x in (("keys", keys), ("table", table), ("tau", tau), ("bias", bias)):
        check_alike(op, name, x, "q", q)
    return (_op if is_compiling() else _call)(q, keys, table, tau, bias)
