"""The causal sum as one Scan over chunks of tokens: their number need not be known."""

import torch
from torch.nn import functional as F

from planmill.kernels.attention.linear_attention.reference import CHUNK, apply_map, linear_attention_reference
from planmill.kernels.common.portable import State, scan


def linear_attention_portable(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, feature_map: str, normalize: bool,
    causal: bool, scale: float, eps: float,
) -> torch.Tensor:  # fmt: skip
    """See the reference; in float32."""
    if not causal:
        return linear_attention_reference(q, k, v, mask, feature_map, normalize, causal, scale, eps)
    r, f = scale * apply_map(q.float(), feature_map), apply_map(k.float(), feature_map)
    values = torch.cat((v.float(), torch.ones_like(v[..., :1], dtype=torch.float32)), -1)
    if mask.numel():
        f = torch.where(mask[:, None, :, None], f, 0)
        values = torch.where(mask[:, None, :, None], values, 0)
    tokens = q.shape[2]
    chunks = tokens // CHUNK + 2  # one more than needed: torch can tell that it is not 1, a size that it fixes
    padding = (0, 0, 0, chunks * CHUNK - tokens)
    r, f, values = (F.pad(x, padding).unflatten(2, (chunks, CHUNK)).movedim(2, 0) for x in (r, f, values))

    def step(state: State, now: State, _: State) -> tuple[State, State]:
        a, b, c = now  # [B, H, CHUNK, d], [B, H, d, CHUNK], [B, H, CHUNK, dv + 1]
        seen = (c - c).cumsum(2)
        o = (a @ b).tril() @ torch.where(c.isfinite(), c, 0) + seen + a @ state[0]
        return [state[0] + b @ c], [o]

    start = r.new_zeros(*f.shape[1:3], f.shape[4], values.shape[4])
    _, (o,) = scan(step, [start], [r, f.mT, values])  # reshapes outside the loop: see gated_linear_attention
    o = o.movedim(0, 2).flatten(2, 3)[:, :, :tokens]
    total = o[..., -1:] + eps if normalize else 1
    return (o[..., :-1] / total).to(q.dtype)
