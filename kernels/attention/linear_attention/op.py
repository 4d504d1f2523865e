"""linear_attention: schema, shape rule, checks and the public function."""

import torch
from torch.compiler import is_compiling

from planmill.kernels.attention.linear_attention.cases import cases
from planmill.kernels.attention.linear_attention.compare import compare
from planmill.kernels.attention.linear_attention.reference import FEATURE_MAPS, linear_attention_reference
from planmill.kernels.common.checks import check_alike, check_choice, check_device, check_dtype, check_float, check_rank
from planmill.kernels.common.registration import register
from planmill.kernels.common.spec import OpSpec

SMALLEST = 1e-37  # an eps below would not be a normal float32

SPEC = OpSpec(
    schema="linear_attention(Tensor q, Tensor k, Tensor v, Tensor mask, str feature_map, bool normalize, "
    "bool causal, float scale, float eps) -> Tensor",
    outputs=lambda q, k, v, *rest: [((*q.shape[:3], v.shape[3]), q.dtype)],
    reference=linear_attention_reference,
    portable="portable:linear_attention_portable",
    cases=cases,
    tolerances={torch.float32: (2e-6, 2e-6), torch.bfloat16: (1e-3, 8e-3), torch.float16: (1e-3, 1e-3)},
    cpu="C++",
    cuda="_triton:launch",
    compare=compare,
)
_op, _call = register(SPEC)


def attend_linearly(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    feature_map: str = "elu",
    normalize: bool = True,
    causal: bool = False,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-6,
) -> torch.Tensor:
    """Attention with a product of features in place of the softmax, in time and memory linear in N.

    With r_n = scale * phi(q_n), over the keys m that the mask keeps (and, if causal, m <= n):

        M = sum over m of phi(k_m) v_m^T,    z = sum over m of phi(k_m)
        o_n = r_n M / (r_n . z + eps)        normalize
        o_n = r_n M                          otherwise

    and phi, element by element: "elu" elu(x) + 1, "relu" max(x, 0), "squared_relu" max(x, 0)^2, "identity" x. Products
    and sums are float32 at least, whatever the dtype of q: M and z grow with N, and would leave float16.

    Args:
        q: [B, H, N, D], float16, bfloat16 or float32, any strides; D at least 1.
        k: [B, H, M, D] like q.
        v: [B, H, M, E] like q.
        feature_map: "elu", "relu", "squared_relu" or "identity".
        normalize: divide by the sum of the weights. With "identity" that sum may be of any sign and near zero.
        causal: token n sees the keys m <= n; M = N.
        mask: [B, M] bool, False: the key is padding, and what it holds does not matter.
        scale: of phi(q); None: 1 where normalized, D^-1/2 otherwise. Where normalized it cancels but for eps.
        eps: at least 1e-37, so that no weights at all ("relu" of negative keys, or everything masked) give 0.

    Returns:
        [B, H, N, E] of the dtype of q, computed in float32 and rounded once. A NaN in q makes its own row NaN; one in k
        or v that is not padding reaches every row that sees it.

    Raises:
        ValueError: wrong rank or shape, an unknown feature map, eps too small, another device, causal with M != N.
        TypeError: another dtype.

    Source: Katharopoulos et al., "Transformers are RNNs: fast autoregressive transformers with linear attention" (ICML
    2020), sections 3.2 to 3.4; the defaults are those of its code. Un-normalised with D^-1/2: flash-linear-attention.
    """
    op = "linear_attention"
    check_rank(op, "q", q, 4, "[B, H, N, D]")
    check_float(op, "q", q)
    batch, heads, tokens, width = q.shape
    for name, x, layout in (("k", k, "[B, H, M, D]"), ("v", v, "[B, H, M, E]")):
        check_rank(op, name, x, 4, layout)
        check_alike(op, name, x, "q", q)
    if width == 0:
        raise ValueError(f"{op}: q must be [B, H, N, D] with D at least 1, got {list(q.shape)}")
    if k.shape[:2] != q.shape[:2] or k.shape[3] != width:
        raise ValueError(f"{op}: k must be [{batch}, {heads}, M, {width}] like q, got {list(k.shape)}")
    if v.shape[:3] != k.shape[:3]:
        raise ValueError(f"{op}: v must be [{batch}, {heads}, {k.shape[2]}, E] like k, got {list(v.shape)}")
    if causal and k.shape[2] != tokens:
        raise ValueError(f"{op}: k must have the {tokens} tokens of q where causal, got {k.shape[2]}")
    check_choice(op, "feature_map", feature_map, FEATURE_MAPS)
    if eps < SMALLEST:
        raise ValueError(f"{op}: eps must be at least {SMALLEST}, got {eps}")
    if mask is None:
        mask = q.new_empty(0, dtype=torch.bool)
    else:
        check_dtype(op, "mask", mask, torch.bool)
        check_device(op, "mask", mask, "q", q)
        if mask.shape != (batch, k.shape[2]):
            raise ValueError(f"{op}: mask must be [{batch}, {k.shape[2]}], [B, M] of k, got {list(mask.shape)}")
    if scale is None:
        scale = 1.0 if normalize else width**-0.5
    return (_op if is_compiling() else _call)(q, k, v, mask, feature_map, normalize, causal, scale, eps)
