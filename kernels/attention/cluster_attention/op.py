"""cluster_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.cluster_attention.cases import cases
from planmill.kernels.attention.cluster_attention.reference import cluster_attention_reference
from planmill.kernels.common.checks import check_alike, check_device, check_dtype, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

OP = "cluster_attention"

SPEC = OpSpec(
    schema="cluster_attention(Tensor q, Tensor k, Tensor v, Tensor q_members, Tensor k_members, Tensor memory_k, "
    "Tensor memory_v, Tensor q_mask, Tensor k_mask, float scale, bool causal, bool shared_qk) -> Tensor",
    outputs=lambda q, k, v, *rest: [((q.shape[0], q.shape[1], q.shape[2], v.shape[3]), q.dtype)],
    reference=cluster_attention_reference,
    portable="portable:cluster_attention_portable",
    cases=cases,
    tolerances={torch.float32: (1e-5, 1e-5), torch.bfloat16: (2e-3, 8e-3), torch.float16: (2e-3, 2e-3)},
    cpu="C++",
    cuda="_triton:launch",
    cuda_limit="heads of more than 256 channels",
)
_op, _call = register(SPEC)


def attend_in_clusters(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_members: torch.Tensor,
    k_members: torch.Tensor | None = None,
    *,
    memory_k: torch.Tensor | None = None,
    memory_v: torch.Tensor | None = None,
    q_mask: torch.Tensor | None = None,
    k_mask: torch.Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    shared_qk: bool = False,
) -> torch.Tensor:
    """Softmax attention inside each cluster of tokens, and for each token the mean over its clusters.

    For cluster c with queries Q_c = q[q_members[c]], keys K_c = k[k_members[c]], values V_c and its memory slots:

        O_c    = softmax(scale Q_c [memory_k; K_c]^T + masks) [memory_v; V_c]
        out[n] = sum over the clusters c that hold n of O_c[n] / (number of them + 1e-5);  0 where there is none

    A hidden pair has the logit -3.4e38: a query that may see nothing gets the mean of its hidden values, as published.
    Memory slots are never hidden. Arithmetic is float32; the result is rounded once. Nothing of size N x N is made.

    Args:
        q: [B, H, N, d], float32, bfloat16 or float16, any strides.
        k: [B, H, Nk, d], dtype of q. With `shared_qk` the same as q.
        v: [B, H, Nk, dv], dtype of q.
        q_members: [B, H, C, w] int32, 0 to N - 1, each token at most once in a cluster: see `choose_members`.
        k_members: [B, H, C, w'] int32, 0 to Nk - 1; None: those of the queries. Given unless `shared_qk`.
        memory_k, memory_v: [H, C, m, d] and [H, C, m, dv] float32, bfloat16 or float16: slots that every query of a
            cluster sees, rounded to the dtype of q; both or neither.
        q_mask, k_mask: [B, N] and [B, Nk] bool, False is padding: a padded query sees no key, a padded key is not seen.
        scale: of the logits; None: d ** -0.5.
        causal: a query sees no key of a higher original index.
        shared_qk: keys are brought to length one, and a token sees itself with the logit -5e4: only where it has
            nothing else. This stands above the masks.

    Returns:
        [B, H, N, dv], dtype of q. A NaN logit counts as -inf, and a result is NaN only where all logits of its row are,
        or where v is not finite. Equal bits on every run, but on a GPU for heads wider than its kernel takes (see
        `which`). The CPU raises where a member is out of range; on a GPU, which is not waited for, such a member reads
        a zero row and its result is dropped.

    Raises:
        ValueError: wrong rank or shape, another device, `k_members` missing, or given with `shared_qk`, one memory
            alone, a member out of range (CPU).
        TypeError: another dtype.

    Source: Roy et al., "Efficient content-based sparse attention with routing transformers" (TACL 2021), as in the
    public routing-transformer package (masks, memory, the 1e-5, the constants). Heads of another width for values and
    sums in a fixed order are our addition.
    """
    _check_tokens(q, k, v)
    if shared_qk == (k_members is not None):
        raise ValueError(f"{OP}: k_members must be given without shared_qk, and not with it, got shared_qk={shared_qk}")
    if shared_qk and k.shape != q.shape:
        raise ValueError(f"{OP}: k must be {list(q.shape)} like q with shared_qk, got {list(k.shape)}")
    members = q_members if k_members is None else k_members
    _check_members(q, q_members, members)
    if (memory_k is None) != (memory_v is None):
        raise ValueError(f"{OP}: memory_k and memory_v must be given together, got one of them")
    clusters = q_members.shape[2]
    if memory_k is None or memory_v is None:
        memory_k, memory_v = (t.new_empty(t.shape[1], clusters, 0, t.shape[3], dtype=torch.float32) for t in (q, v))
    else:
        _check_memory(q, v, clusters, memory_k, memory_v)
    for name, mask, like in (("q_mask", q_mask, q), ("k_mask", k_mask, k)):
        _check_mask(name, mask, like)
    none = q.new_empty(0, dtype=torch.bool)
    return (_op if is_compiling() else _call)(
        q, k, v, q_members, members, memory_k.to(q.dtype).float(),
        memory_v.to(q.dtype).float(),
        none if q_mask is None else q_mask, none if k_mask is None else k_mask,
        q.shape[3] ** -0.5 if scale is None else scale, causal, shared_qk,
    )  # fmt: skip


def _check_tokens(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    for name, x, layout in (("q", q, "[B, H, N, d]"), ("k", k, "[B, H, Nk, d]"), ("v", v, "[B, H, Nk, dv]")):
        check_rank(OP, name, x, 4, layout)
        check_float(OP, name, x)
        check_alike(OP, name, x, "q", q)
    if q.shape[3] == 0:
        raise ValueError(f"{OP}: q must be [B, H, N, d] with d at least 1, got {list(q.shape)}")
    if (*k.shape[:2], k.shape[3]) != (*q.shape[:2], q.shape[3]):
        raise ValueError(f"{OP}: k must be [{q.shape[0]}, {q.shape[1]}, Nk, {q.shape[3]}] like q, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{OP}: v must be [{k.shape[0]}, {k.shape[1]}, {k.shape[2]}, dv] like k, got {list(v.shape)}")


def _check_members(q: torch.Tensor, q_members: torch.Tensor, k_members: torch.Tensor) -> None:
    for name, members in (("q_members", q_members), ("k_members", k_members)):
        check_rank(OP, name, members, 4, "[B, H, C, w]")
        check_dtype(OP, name, members, torch.int32)
        check_device(OP, name, members, "q", q)
        if (*members.shape[:2], members.shape[2]) != (*q.shape[:2], q_members.shape[2]):
            needed = f"[{q.shape[0]}, {q.shape[1]}, {q_members.shape[2]}, w]"
            raise ValueError(f"{OP}: {name} must be {needed}, got {list(members.shape)}")


def _check_memory(
    q: torch.Tensor, v: torch.Tensor, clusters: int, memory_k: torch.Tensor, memory_v: torch.Tensor
) -> None:
    for name, memory, width in (("memory_k", memory_k, q.shape[3]), ("memory_v", memory_v, v.shape[3])):
        check_rank(OP, name, memory, 4, "[H, C, m, d]")
        check_float(OP, name, memory)
        check_device(OP, name, memory, "q", q)
        if (memory.shape[0], memory.shape[1], memory.shape[3]) != (q.shape[1], clusters, width):
            needed = f"[{q.shape[1]}, {clusters}, m, {width}]"
            raise ValueError(f"{OP}: {name} must be {needed}, got {list(memory.shape)}")
    if memory_k.shape[2] != memory_v.shape[2]:
        raise ValueError(f"{OP}: memory_v must hold {memory_k.shape[2]} slots like memory_k, got {memory_v.shape[2]}")


def _check_mask(name: str, mask: torch.Tensor | None, like: torch.Tensor) -> None:
    if mask is None:
        return
    check_dtype(OP, name, mask, torch.bool)
    check_device(OP, name, mask, "q", like)
    if mask.shape != (like.shape[0], like.shape[2]):
        raise ValueError(f"{OP}: {name} must be [{like.shape[0]}, {like.shape[2]}], got {list(mask.shape)}")
