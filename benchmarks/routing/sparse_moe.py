"""SparseMoE with the weights of a published block, against that block: a small Mixtral, a Qwen2-MoE, a V-MoE.

transformers runs a block's experts by one of several functions. A model that was loaded picks "grouped_mm"; a block on
its own runs "eager", a loop over experts, and so does a model where grouped_mm is not to be had. The compiled peer is
grouped_mm, which compiles as one graph.

Error: largest difference from float64 over random tokens, as a share of the largest result of its token; tokens whose
k-th and next logit are nearly equal are left out, since rounding decides there. Bytes: the weights of the experts in
use and of the router, the tokens and the results.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from planmill.kernels.routing import SparseMoE
from planmill.kernels.routing.expert_mixture.reference import expert_mixture_reference

from ..cases import Case, Draw, Goal, Peer, plain
from ..published import modeling

TOKENS_CHECKED = 32
MARGIN = 0.05  # of logits with a standard deviation of one

Arguments = tuple[torch.Tensor, SparseMoE, Any]


def randomize(draw: Draw, module: nn.Module) -> None:
    """Weights under which logits and results are of the order of one."""
    for parameter in module.parameters():
        parameter.data = draw.normal(*parameter.shape) * parameter.shape[-1] ** -0.5
        parameter.requires_grad_(False)


def published(family: str, name: str, tokens: int, **sizes: Any) -> Callable[[Draw], Arguments]:
    """Tokens, our layer and the published block, which share their weights."""

    def make(draw: Draw) -> Arguments:
        module = modeling(family)
        block = getattr(module, f"{name}SparseMoeBlock")(getattr(module, f"{name}Config")(**sizes)).eval()
        randomize(draw, block)
        return draw.normal(1, tokens, sizes["hidden_size"]), SparseMoE.from_module(block), block

    return make


def mixtral(tokens: int, d: int = 384, hidden: int = 1536) -> Callable[[Draw], Arguments]:
    """Eight SwiGLU experts, two a token."""
    sizes = {"hidden_size": d, "intermediate_size": hidden, "num_local_experts": 8, "num_experts_per_tok": 2}
    return published("mixtral", "Mixtral", tokens, **sizes)


def qwen(tokens: int, d: int = 512, hidden: int = 352) -> Callable[[Draw], Arguments]:
    """Sixty small SwiGLU experts, four a token, and a gated shared expert four times as wide."""
    sizes = {"hidden_size": d, "moe_intermediate_size": hidden, "shared_expert_intermediate_size": 4 * hidden}
    return published("qwen2_moe", "Qwen2Moe", tokens, **sizes, num_experts=60, num_experts_per_tok=4)


def vmoe(tokens: int, d: int = 768, hidden: int = 3072) -> Callable[[Draw], Arguments]:
    """Eight GELU experts with biases, two a token, as in V-MoE-B/16."""

    def make(draw: Draw) -> Arguments:
        layer = SparseMoE(d, hidden, 8, 2, gated=False, bias=True, activation="gelu_tanh").eval()
        randomize(draw, layer)
        return draw.normal(1, tokens, d), layer, None

    return make


def ours(x: torch.Tensor, layer: SparseMoE, block: Any) -> torch.Tensor:
    """The layer, without a graph."""
    with torch.no_grad():
        return layer(x)


def transformers(implementation: str, compiled: bool, x: torch.Tensor, layer: Any, block: Any) -> Callable[[], Any]:
    """The published block with one implementation of its experts; compiling is not timed."""
    twin = copy.deepcopy(block, {id(p): p for p in block.parameters()})
    twin.experts.config._experts_implementation = implementation
    call = torch.compile(twin) if compiled else twin
    with torch.no_grad():
        call(x)

    def run() -> torch.Tensor:
        with torch.no_grad():
            return call(x)

    return run


def loop(x: torch.Tensor, layer: SparseMoE, block: Any) -> torch.Tensor:
    """Softmax, topk, then expert by expert: rows selected, two linear layers, `index_add_`."""
    rows, e = x.flatten(0, -2), layer.experts
    top = F.linear(rows, layer.gate.weight).float().softmax(1).topk(layer.k)
    y = torch.zeros_like(rows)
    for expert in range(layer.gate.weight.shape[0]):
        token, slot = (top.indices == expert).nonzero(as_tuple=True)
        if len(token) == 0:
            continue
        h = F.gelu(F.linear(rows[token], e.up_proj[expert], e.up_proj_bias[expert]), approximate="tanh")
        h = F.linear(h, e.down_proj[expert], e.down_proj_bias[expert])
        y.index_add_(0, token, h * top.values[token, slot, None].to(x.dtype))
    return y.view(x.shape)


@torch.no_grad()
def check(args: Arguments, found: torch.Tensor) -> float:
    """Random tokens, of those with a clear choice, against the definition in float64."""
    x, layer, _ = args
    rows, found = x.flatten(0, -2), found.flatten(0, -2)
    logits = rows.double() @ layer.gate.weight.double().T
    best = logits.topk(layer.k + 1).values
    clear = (best[:, -2] - best[:, -1] > MARGIN).nonzero().flatten()
    if len(clear) == 0:
        clear = torch.arange(len(rows), device=x.device)
    chosen = clear[torch.randperm(len(clear))[:TOKENS_CHECKED].to(clear.device)]
    top = logits[chosen].softmax(1).topk(layer.k)
    weights = top.values / top.values.sum(1, keepdim=True) if layer.routing.get("renormalize") else top.values
    t = rows[chosen].double()
    want = mixture(layer.experts, t, top.indices.int(), weights, layer.activation)
    if layer.shared_expert is not None and layer.shared_expert_gate is not None:
        every, gate = torch.zeros(len(t), 1, dtype=torch.int32), layer.shared_expert_gate.weight.double()
        want += mixture(layer.shared_expert, t, every.to(t.device), F.linear(t, gate).sigmoid(), layer.activation)
    return float(((found[chosen].double() - want).abs().amax(1) / want.abs().amax(1)).max())


def mixture(
    experts: Any, t: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, activation: str
) -> torch.Tensor:
    """The definition, on these experts."""
    up, none = getattr(experts, experts.up_name), t.new_empty(0)
    up_bias, down_bias = getattr(experts, experts.up_name + "_bias"), experts.down_proj_bias
    biases = [none if bias is None else bias.double() for bias in (up_bias, down_bias)]
    return expert_mixture_reference(
        t, indices, weights, up, biases[0], experts.down_proj, biases[1], activation, False
    )  # fmt: skip


def _sizes(layer: SparseMoE) -> tuple[int, int]:
    """Numbers in one expert's matrices, and in the shared expert's."""
    experts, shared = layer.experts, layer.shared_expert
    one = getattr(experts, experts.up_name)[0].numel() + experts.down_proj[0].numel()
    return one, 0 if shared is None else shared.gate_up_proj.numel() + shared.down_proj.numel()


def flops(x: torch.Tensor, layer: SparseMoE, block: Any) -> float:
    """Matrices of the router, of the chosen experts and of the shared one."""
    one, shared = _sizes(layer)
    return 2.0 * (x.numel() // x.shape[-1]) * (layer.k * one + shared + layer.gate.weight.numel())


def moved(x: torch.Tensor, layer: SparseMoE, block: Any) -> float:
    """Weights in use, tokens and results, once each."""
    one, shared = _sizes(layer)
    with torch.no_grad():
        used = len(layer(x, return_routing=True)[2].unique())
    return float((used * one + shared + layer.gate.weight.numel() + 2 * x.numel()) * x.element_size())


EAGER, COMPILED = "transformers eager", "transformers grouped_mm, compiled"
BLOCKS = {
    EAGER: Peer(partial(transformers, "eager", False), package="transformers", tolerance=5e-2),
    "transformers grouped_mm": Peer(partial(transformers, "grouped_mm", False), package="transformers", tolerance=5e-2),
    COMPILED: Peer(partial(transformers, "grouped_mm", True), package="transformers", tolerance=5e-2),
}
BATCHED = Peer(partial(transformers, "batched_mm", False), package="transformers", tolerance=5e-2)
SHARED: dict[str, Any] = {
    "op": "sparse_moe", "ours": ours, "check": check, "tolerance": {torch.float32: 5e-6, torch.bfloat16: 3e-2},
    "flops": flops, "bytes": moved, "dtypes": (torch.float32, torch.bfloat16), "devices": ("cpu",),
}  # fmt: skip


def peers(tokens: int) -> dict[str, Peer]:
    """batched_mm copies the weights of each token's experts: only for one token."""
    return {**BLOCKS, "transformers batched_mm": BATCHED} if tokens == 1 else dict(BLOCKS)


def goals(float32: float, bfloat16: float) -> tuple[Goal, ...]:
    """Against the eager block, per dtype; and no slower than the compiled one."""
    return (
        Goal("ratio", float32, EAGER, torch.float32),
        Goal("ratio", bfloat16, EAGER, torch.bfloat16),
        Goal("ratio", 1.0, COMPILED),
    )


CASES = [
    *(
        Case(
            id=f"mixtral-T{tokens}-D384-F1536-E8-k2",
            make=mixtral(tokens),
            small=mixtral(min(tokens, 9), 32, 64),
            peers=peers(tokens),
            package="transformers",
            goals=asked,
            calls=8 if tokens == 1 else 1,
            **SHARED,
        )
        for tokens, asked in ((1, goals(1.0, 1.8)), (197, goals(1.5, 2.5)), (1576, goals(1.3, 1.7)))
    ),
    Case(
        id="vmoe-T197-D768-F3072-E8-k2",
        make=vmoe(197),
        small=vmoe(9, 32, 64),
        peers={"loop over experts": Peer(plain(loop), tolerance=5e-2)},
        **SHARED,
    ),
    *(
        Case(
            id=f"qwen-T{tokens}-D512-F352-E60-k4-shared",
            make=qwen(tokens),
            small=qwen(min(tokens, 9), 32, 64),
            peers={name: peer for name, peer in peers(tokens).items() if name != COMPILED},
            package="transformers",
            calls=8 if tokens == 1 else 1,
            **SHARED,
        )
        for tokens in (1, 197)
    ),
]
