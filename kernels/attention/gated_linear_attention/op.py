"""gated_linear_attention: schema, shape rule, checks and the public functions."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.gated_linear_attention.cases import cases
from planmill.kernels.attention.gated_linear_attention.reference import gated_linear_attention_reference
from planmill.kernels.attention.gated_linear_attention.result import Streamed
from planmill.kernels.common.checks import check_alike, check_device, check_dtype, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SPEC = OpSpec(
    schema="gated_linear_attention(Tensor q, Tensor k, Tensor v, Tensor log_gates, Tensor backward_log_gates, "
    "Tensor initial_state, float scale, bool return_state) -> (Tensor, Tensor)",
    outputs=lambda q, k, v, log_gates, backward_log_gates, initial_state, scale, return_state: [
        (v.shape, v.dtype),
        ((int(return_state) * q.shape[0], q.shape[2], q.shape[3], v.shape[3]), torch.float32),
    ],
    reference=gated_linear_attention_reference,
    portable="portable:gated_linear_attention_portable",
    cases=cases,
    # Sums over the tokens grow with them: errors are those of a sum of some hundred products
    tolerances={torch.float32: (2e-5, 2e-5), torch.bfloat16: (4e-3, 8e-3), torch.float16: (2e-3, 2e-3)},
    cpu="C++",
    cuda="_triton:launch",
)
_op, _call = register(SPEC)

OP = "gated_linear_attention"


def attend_with_gates(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gates: torch.Tensor,
    *,
    backward_log_gates: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Gated linear attention, causal or in both directions at once.

    With alpha_t = exp(log_gates_t) in each head, S_0 = 0:

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        o_t = scale q_t^T S_t                       causal
        o_t = 1/2 (forward o_t + backward o_t)                                                     both directions

    The gate of token t decays what stood before it, not the token itself. The backward direction is the same recurrence
    from the last token to the first, with its own gates and the same q, k, v; both directions hold token t itself. The
    state is float32 whatever the dtype; it never leaves the chip, and memory beyond the result does not grow with dk.
    No quotient of gates is formed, so gates of zero are exact: log_gates may be -inf.

    Args:
        q, k: [B, N, H, dk], float32, bfloat16 or float16, any strides: token-major, as flash-linear-attention has it.
        v: [B, N, H, dv], dtype of q.
        log_gates: [B, N, H, dk], natural logarithms of the gates, 0 at most in use (larger ones let the state grow);
            dtype of q, or float32.
        backward_log_gates: [B, N, H, dk], dtype of log_gates, for both directions; None: causal.
        scale: factor of q; dk**-0.5 if None.

    Returns:
        [B, N, H, dv], contiguous, dtype of v. A token with k = 0 and log gate 0 is padding: it changes no other token.
        NaN in q stays in its token; NaN in k, v or a gate goes on to the tokens that follow in its direction. So does
        an infinity in v; whether as infinity or as NaN is left open.

    Raises:
        ValueError: wrong rank or shape, dk of 0, another device.
        TypeError: another dtype.

    Source: Yang et al., "Gated linear attention transformers with hardware-efficient training" (ICML 2024), section 4;
    both directions: Liao et al., "ViG: linear-complexity visual sequence learning with gated linear attention"
    (AAAI 2025), section 3. The mean of the directions is that of ViG's training code.
    """
    _check(q, k, v, log_gates, backward_log_gates)
    backward = log_gates.new_empty(0) if backward_log_gates is None else backward_log_gates
    initial = q.new_empty(0, dtype=torch.float32)
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    return (_op if is_compiling() else _call)(q, k, v, log_gates, backward, initial, scale, False)[0]


def stream_with_gates(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    log_gates: torch.Tensor,
    state: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> Streamed:
    """Causal gated linear attention of the next tokens of a stream, from the state that earlier ones left.

        S_t = diag(alpha_t) S_{t-1} + k_t v_t^T        o_t = scale q_t^T S_t        S_0 = state

    However a stream is cut, the results are those of `attend_with_gates` on the whole of it, on a CPU to the bit.

    Args:
        q, k, v, log_gates, scale: the next N tokens, as in `attend_with_gates`.
        state: [B, H, dk, dv] float32, the state so far; zeros if None.

    Returns:
        (out, state): out [B, N, H, dv] in the dtype of v, and the state after the last token, [B, H, dk, dv] float32.

    Raises:
        ValueError: wrong rank or shape, dk of 0, another device.
        TypeError: another dtype.

    Source: as `attend_with_gates`; flash-linear-attention has the state as `initial_state` and `output_final_state`.
    """
    _check(q, k, v, log_gates, None)
    if state is not None:
        needed = [q.shape[0], q.shape[2], q.shape[3], v.shape[3]]
        if list(state.shape) != needed:
            raise ValueError(f"{OP}: state must be {needed}, [B, H, dk, dv], got {list(state.shape)}")
        check_dtype(OP, "state", state, torch.float32)
        check_device(OP, "state", state, "q", q)
    initial = q.new_empty(0, dtype=torch.float32) if state is None else state
    scale = q.shape[3] ** -0.5 if scale is None else float(scale)
    call = _op if is_compiling() else _call
    return Streamed(*call(q, k, v, log_gates, log_gates.new_empty(0), initial, scale, True))


def _check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, log_gates: torch.Tensor, backward: torch.Tensor | None
) -> None:
    check_rank(OP, "q", q, 4, "[B, N, H, dk]")
    check_rank(OP, "v", v, 4, "[B, N, H, dv]")
    check_float(OP, "q", q)
    if q.shape[3] == 0:
        raise ValueError(f"{OP}: q must be [B, N, H, dk] with dk at least 1, got {list(q.shape)}")
    like_q = [("k", k), ("log_gates", log_gates)] + ([] if backward is None else [("backward_log_gates", backward)])
    for name, x in like_q:
        if x.shape != q.shape:
            raise ValueError(f"{OP}: {name} must be {list(q.shape)}, [B, N, H, dk] of q, got {list(x.shape)}")
    if v.shape[:3] != q.shape[:3]:
        raise ValueError(f"{OP}: v must be {[*q.shape[:3], 'dv']}, [B, N, H] of q, got {list(v.shape)}")
    check_alike(OP, "k", k, "q", q)
    check_alike(OP, "v", v, "q", q)
    check_dtype(OP, "log_gates", log_gates, q.dtype, torch.float32)
    check_device(OP, "log_gates", log_gates, "q", q)
    if backward is not None:
        check_alike(OP, "backward_log_gates", backward, "log_gates", log_gates)
