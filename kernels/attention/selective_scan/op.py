"""selective_scan: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.selective_scan.cases import cases
from planmill.kernels.attention.selective_scan.chunks import selective_scan_backward
from planmill.kernels.attention.selective_scan.reference import selective_scan_reference
from planmill.kernels.common.checks import check_alike, check_device, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="selective_scan(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor D, Tensor z, "
    "Tensor delta_bias, bool delta_softplus) -> (Tensor, Tensor)",
    outputs=lambda u, delta, A, *_: [(u.shape, u.dtype), ((u.shape[0], u.shape[1], A.shape[1]), torch.float32)],
    reference=selective_scan_reference,
    portable="portable:selective_scan_portable",
    cases=cases,
    tolerances={torch.float32: (2e-5, 2e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (1e-3, 1e-3)},
    cpu="C++",
    cuda="_triton:launch",
    backward=selective_scan_backward,
)
_op, _call = register(SPEC)


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

    All arithmetic is float32 and states stay where they are computed: nothing of size L Ns is stored (exp(dl A) and
    dl B u would be 2 Ns times the input). The gradient keeps the states of all positions.

    Args:
        u, delta: [B, Di, L] float32, bfloat16 or float16, any strides; transposes of [B, L, Di] are as good.
        A: [Di, Ns] float, real; negative in a trained model (-exp(A_log)).
        B, C: [B, Ns, L], or [B, G, Ns, L] for G groups of Di / G adjacent channels; dtype of u.
        D: [Di] float, the skip; None: none.
        z: [B, Di, L], dtype of u, the gate; None: none.
        delta_bias: [Di] float; None: 0.
        delta_softplus: take the softplus of delta + delta_bias.

    Returns:
        y [B, Di, L], dtype of u; and the last state h_L [B, Di, Ns] float32. A NaN reaches the later positions of
        its sample, and no earlier ones.

    Raises:
        ValueError: shapes that do not fit, another device.
        TypeError: another dtype; complex A, which Mamba's own kernels also take, is not supported.

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023), section 3.2 and
    algorithm 2; order and names of the arguments as in state-spaces/mamba's `selective_scan_fn`.
    """
    op = "selective_scan"
    check_rank(op, "u", u, 3, "[B, Di, L]")
    check_float(op, "u", u)
    check_rank(op, "A", A, 2, "[Di, Ns]")
    batch, channels, length = u.shape
    groups = B.shape[1] if B.dim() == 4 else 1
    if groups < 1 or channels % groups:
        raise ValueError(f"{op}: B must have a number of groups that divides {channels} channels, got {list(B.shape)}")
    maps = [batch, groups, A.shape[1], length] if B.dim() == 4 else [batch, A.shape[1], length]
    full, row = [batch, channels, length], [channels]
    wanted = {"delta": (delta, full, True), "A": (A, [channels, A.shape[1]], False), "B": (B, maps, True),
              "C": (C, maps, True), "D": (D, row, False), "z": (z, full, True),
              "delta_bias": (delta_bias, row, False)}  # fmt: skip
    for name, (x, shape, alike) in wanted.items():
        if x is None:
            continue
        check_float(op, name, x)
        if alike:
            check_alike(op, name, x, "u", u)
        check_device(op, name, x, "u", u)
        if list(x.shape) != shape:
            raise ValueError(f"{op}: {name} must be {shape}, got {list(x.shape)}")
    if B.dim() == 3:
        B, C = B[:, None], C[:, None]
    none = u.new_empty(0)
    D, z, delta_bias = (none if x is None else x for x in (D, z, delta_bias))
    return (_op if is_compiling() else _call)(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
