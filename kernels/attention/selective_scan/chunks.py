"""The scan in plain PyTorch, for the gradient: chunks of the sequence side by side, their steps one after another."""

import torch
from torch.nn import functional as F


def scan_in_chunks(
    u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor, z: torch.Tensor, delta_bias: torch.Tensor, delta_softplus: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What the op computes, in float32, differentiable.

    The sequence is cut into about sqrt(L) chunks. All chunks take a step at once: first from a zero state, for what
    each adds to the state behind it; then from the state before it, for y. So about 3 sqrt(L) steps replace L; each
    exponential is taken twice.
    """
    dl = delta.float() + delta_bias.float()[:, None] if delta_bias.numel() else delta.float()
    dl = F.softplus(dl) if delta_softplus else dl
    batch, channels, length = u.shape
    groups = B.shape[1]
    size = max(1, int(length**0.5))
    count = -(-length // size)

    def steps(x: torch.Tensor) -> list[torch.Tensor]:
        """[..., L] cut into chunks: for each step of a chunk, [..., chunks]. Zeros behind the end change nothing."""
        padded = F.pad(x.float(), (0, count * size - length))
        return list(padded.unflatten(-1, (count, size)).unbind(-1))

    def grouped(x: torch.Tensor) -> torch.Tensor:  # [B, Di, ...] -> [B, G, Di / G, ...]
        return x.unflatten(1, (groups, channels // groups))

    rate = A.float().unflatten(0, (groups, channels // groups))[..., None]  # [G, Di / G, Ns, 1]
    time, drive = steps(grouped(dl)), steps(grouped(dl * u.float()))  # each [B, G, Di / G, chunks]
    into, out = steps(B), steps(C)  # each [B, G, Ns, chunks]

    def advance(h: torch.Tensor, t: int) -> torch.Tensor:
        decay = torch.exp(time[t][..., None, :] * rate)
        return decay * h + drive[t][..., None, :] * into[t][:, :, None]

    h = u.new_zeros(batch, groups, channels // groups, A.shape[1], count, dtype=torch.float32)
    for t in range(size):
        h = advance(h, t)
    decay = torch.exp(torch.stack(time).sum(0)[..., None, :] * rate)  # of a whole chunk
    state, before = h.new_zeros(h.shape[:-1]), []
    for added, kept in zip(h.unbind(-1), decay.unbind(-1), strict=True):
        before.append(state)
        state = kept * state + added
    h, rows = torch.stack(before, -1) if before else h, []
    for t in range(size):
        h = advance(h, t)
        rows.append((h * out[t][:, :, None]).sum(3))
    y = torch.stack(rows, -1).flatten(-2)[..., :length].flatten(1, 2)
    y = y + D.float()[:, None] * u.float() if D.numel() else y
    y = y * F.silu(z.float()) if z.numel() else y
    return y.to(u.dtype), state.flatten(1, 2)


def selective_scan_backward(args: tuple, outputs: tuple, grads: tuple) -> tuple:
    """Gradients of every tensor, by autograd through `scan_in_chunks`: it keeps the states of all positions."""
    again = [a.detach().requires_grad_() for a in args[:8]]
    call: tuple = (*again, args[8])
    with torch.enable_grad():
        made = scan_in_chunks(*call)
    pairs = [(o, g) for o, g in zip(made, grads, strict=True) if g is not None and o.requires_grad]
    if not pairs:
        return (None,) * len(args)
    found = torch.autograd.grad([o for o, _ in pairs], again, [g for _, g in pairs], allow_unused=True)
    return (*found, None)
