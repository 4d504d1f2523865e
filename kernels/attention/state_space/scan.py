"""The selective scan of Mamba in plain PyTorch: chunks side by side, steps within a chunk one after another."""

import torch
from torch.nn import functional as F

from planmill.kernels.common.checks import check_device, check_float, check_rank


def scan_selectively(
    u: torch.Tensor,
    delta: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mamba's recurrence, whose decay and input weight depend on the input, over the last dimension.

    With dl = delta + delta_bias, or softplus of that, and h_0 = 0, for each channel and each of its Ns states:

        h_t = exp(dl_t A) h_{t-1} + dl_t B_t u_t
        y_t = <C_t, h_t> + D u_t, and y_t silu(z_t) where z is given

    The sequence is cut into about sqrt(L) chunks. All chunks take a step at once: first from a zero state, for what
    each adds to the state behind it; then from the state before it, for y. So nothing of size L Ns is held (exp(dl A)
    and dl B u would be 2 Ns times the input), and about 3 sqrt(L) steps replace L; each exponential is taken twice.
    Under autograd the states of all steps are kept.

    Args:
        u, delta: [B, Di, L] float32, bfloat16 or float16, any strides.
        A: [Di, Ns], real; negative in a trained model (-exp(A_log)).
        B, C: [B, Ns, L], or [B, G, Ns, L] for G groups of Di / G adjacent channels.
        D: [Di], the skip; None: none. z: [B, Di, L], the gate; None: none. delta_bias: [Di].
        delta_softplus: take the softplus of delta + delta_bias.

    Returns:
        y [B, Di, L], dtype of u; and the last state h_L [B, Di, Ns] float32. All arithmetic is float32. A NaN reaches
        the later positions of its sample, and no earlier ones.

    Raises:
        ValueError: shapes that do not fit, another device.
        TypeError: another dtype; complex A, which Mamba's kernels also take, is not supported.

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), section 3.2 and
    algorithm 2; argument names and order of state-spaces/mamba's `selective_scan_fn`.
    """
    op = "scan_selectively"
    B, C = _check(op, u, delta, A, B, C, D, z, delta_bias)
    dl = delta.float() if delta_bias is None else delta.float() + delta_bias.float()[:, None]
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
    y = y if D is None else y + D.float()[:, None] * u.float()
    y = (y if z is None else y * F.silu(z.float())).to(u.dtype)
    return y, state.flatten(1, 2)


def _check(
    op: str, u: torch.Tensor, delta: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
    D: torch.Tensor | None, z: torch.Tensor | None, delta_bias: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Raise unless the arguments fit; B and C as [B, G, Ns, L]."""
    check_rank(op, "u", u, 3, "[B, Di, L]")
    check_rank(op, "A", A, 2, "[Di, Ns]")
    batch, channels, length = u.shape
    groups = B.shape[1] if B.dim() == 4 else 1
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: B must have a number of groups that divides {channels} channels, got {list(B.shape)}")
    states = [batch, A.shape[1], length] if B.dim() != 4 else [batch, groups, A.shape[1], length]
    full, row = [batch, channels, length], [channels]
    wanted = {"u": (u, full), "delta": (delta, full), "A": (A, [channels, A.shape[1]]), "B": (B, states),
              "C": (C, states), "D": (D, row), "z": (z, full), "delta_bias": (delta_bias, row)}  # fmt: skip
    for name, (x, shape) in wanted.items():
        if x is None:
            continue
        check_float(op, name, x)
        check_device(op, name, x, "u", u)
        if list(x.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {list(x.shape)}")
    return (B, C) if B.dim() == 4 else (B[:, None], C[:, None])
