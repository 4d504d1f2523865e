"""softmax_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.softmax_attention.cases import cases
from planmill.kernels.attention.softmax_attention.reference import softmax_attention_reference
from planmill.kernels.common.checks import check_device, check_dtype, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="softmax_attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor",
    outputs=lambda q, k, v, scale: [((q.shape[0], q.shape[2], q.shape[1], v.shape[3]), q.dtype)],
    reference=softmax_attention_reference,
    cases=cases,
    tolerances={torch.float32: (1e-5, 1e-5)},
    cpu="C++",
)
_op, _call = register(SPEC)


def attend_by_softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None = None) -> torch.Tensor:
    """Attention of every query to every key, without a mask; the result in the order in which a projection reads it.

        y_i = sum over j of softmax_j(scale <q_i, k_j>) v_j

    What `torch.nn.functional.scaled_dot_product_attention` gives, transposed. q, k and v may be views of the output of
    one linear layer, `qkv.unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4).unbind(0)`, and `y.flatten(2)` is a view.
    Computed in float32, over blocks of 256 keys with a running maximum, so that no more than a few hundred scores of a
    query are stored. A sample has the same bits in every batch. Made for CPUs: elsewhere the op is its reference.

    Args:
        q: [B, H, N, D], float32, any strides.
        k: [B, H, M, D], float32, any strides.
        v: [B, H, M, Dv], float32, any strides.
        scale: of <q_i, k_j>; None: D^-0.5.

    Returns:
        [B, N, H, Dv], float32; zeros where there are no keys. A query with a score that is NaN or infinity gives NaN,
        and so does one whose scores are all minus infinity; a weight below e^-87 is zero. No other query is touched,
        but a NaN or an infinity in v is seen by every query of its head.

    Raises:
        ValueError: wrong rank or shape, another device, no scale where D is 0.
        TypeError: another dtype.

    Source: Vaswani et al., "Attention is all you need" (2017), equation 1; the running maximum: Milakov and Gimelshein,
        "Online normalizer calculation for softmax" (2018), algorithm 3.
    """
    op = "softmax_attention"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check_rank(op, name, tensor, 4, "[B, H, N, D]")
        check_dtype(op, name, tensor, torch.float32)
        check_device(op, name, tensor, "q", q)
    batch, heads, _, channels = q.shape
    if tuple(k.shape[:2]) != (batch, heads) or k.shape[3] != channels:
        raise ValueError(
            f"{op}: k must be [{batch}, {heads}, M, {channels}] for q {list(q.shape)}, got {list(k.shape)}"
        )
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: v must be [{batch}, {heads}, {k.shape[2]}, Dv] like k, got {list(v.shape)}")
    if scale is None:
        if channels == 0:
            raise ValueError(f"{op}: scale must be given where q has no channels, got {list(q.shape)}")
        scale = channels**-0.5
    return (_op if is_compiling() else _call)(q, k, v, scale)
