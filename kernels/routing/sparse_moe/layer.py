"""SparseMoE: router, experts and shared expert of a published mixture-of-experts layer, through two ops."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from planmill.kernels.common.conversions import register_conversion
from planmill.kernels.routing.expert_mixture import mix_experts
from planmill.kernels.routing.router_logits import score_experts
from planmill.kernels.routing.sparse_moe import convert
from planmill.kernels.routing.sparse_moe.layouts import read_layout
from planmill.kernels.routing.token_routing import expert_capacity, route_tokens


class Router(nn.Module):
    """Parameters of the router: `weight` [E, D], perhaps `bias` [E] and `e_score_correction_bias` [E] float32."""

    e_score_correction_bias: torch.Tensor | None

    def __init__(self, experts: int, dim: int, bias: bool, correction: bool, **made: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, dim, **made))
        self.bias = nn.Parameter(torch.zeros(experts, **made)) if bias else None
        device = made.get("device")
        correction_bias = torch.zeros(experts, dtype=torch.float32, device=device) if correction else None
        self.register_buffer("e_score_correction_bias", correction_bias)


class Experts(nn.Module):
    """Parameters of E experts: `gate_up_proj` [E, 2F, D] or `up_proj` [E, F, D]; `down_proj` [E, D, F]; biases."""

    def __init__(self, experts: int, dim: int, hidden: int, gated: bool, bias: bool, **made: Any) -> None:
        super().__init__()
        self.up_name = "gate_up_proj" if gated else "up_proj"
        rows = 2 * hidden if gated else hidden
        shapes: dict[str, tuple[int, ...]] = {
            self.up_name: (experts, rows, dim),
            "down_proj": (experts, dim, hidden),
            self.up_name + "_bias": (experts, rows),
            "down_proj_bias": (experts, dim),
        }
        for name, shape in shapes.items():
            held = bias or not name.endswith("_bias")
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, **made)) if held else None)

    def forward(self, x: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor, activation: str) -> torch.Tensor:
        """The mixture [T, D]."""
        held = self._parameters
        up, down = held[self.up_name], held["down_proj"]
        up_bias, down_bias = held[self.up_name + "_bias"], held["down_proj_bias"]
        assert up is not None
        assert down is not None
        return mix_experts(x, indices, weights, up, down, up_bias=up_bias, down_bias=down_bias, activation=activation)


class SparseMoE(nn.Module):
    """Sparse mixture of experts: drop-in for the layers of Mixtral, Qwen2/3-MoE, DeepSeek-V3 and V-MoE.

    logits = gate(x); indices, weights = route_tokens(logits, k, ...); y = mix_experts(x, indices, weights, experts)
    plus, where there is one, the shared expert of every token, times sigmoid(shared_expert_gate(x)) if that exists.

    Parameters have the names of the published models: `gate.weight` [E, D], `gate.bias`,
    `gate.e_score_correction_bias`; `experts.gate_up_proj` [E, 2F, D] (gate first) or `experts.up_proj` [E, F, D];
    `experts.down_proj` [E, D, F]; `experts.*_bias`; `shared_expert_gate.weight` [1, D]. The shared expert is held as
    one expert (`shared_expert.gate_up_proj` [1, 2F, D], `shared_expert.down_proj` [1, D, F]). `load_state_dict` also
    reads older layouts: one matrix per expert, separate shared matrices, Flax kernels.

    `from_mixtral`, `from_qwen`, `from_deepseek`, `from_vmoe` and `from_module` take a published module or its state
    dict. Tensors are shared with it, not copied, except where the layout differs: then the fused tensor is new.

    Training works: gradients reach x, the experts and, through the weights, the router; the choice is not
    differentiated. `jitter` (training only) multiplies the input of router and experts by uniform numbers from
    1 - jitter to 1 + jitter. There is no load-balancing loss, and no noise on the logits.

    By default nothing is dropped, and no token's experts depend on other tokens. With `capacity_factor` an expert takes
    at most `expert_capacity(tokens, k, E, capacity_factor)` tokens of a group, as V-MoE was trained: then they do.

    Args:
        dim: width D of the tokens.
        hidden: width F of an expert.
        experts: number of experts E.
        k: experts per token.
        gated: experts are down(act(gate x) * up x), else down(act(up x)).
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        bias: experts have biases.
        shared_hidden: width of the shared expert (gated, no bias), 0: there is none.
        shared_gate: the shared expert is multiplied by sigmoid(shared_expert_gate(x)).
        router_bias: the router has a bias.
        correction_bias: the router has a bias for the choice only.
        router_dtype: "model": logits in the dtype of x, then float32; "float32": x and gate.weight as float32.
        jitter: see above.
        capacity_factor: None: no capacity.
        capacity_group: tokens of a group; None: all tokens of a call are one.
        capacity_multiple: the capacity is rounded up to a multiple of this.
        capacity_priority: "order" or "score".
        dtype, device: of the parameters.
        routing: `score`, `order`, `renormalize`, `eps`, `scale`, `groups`, `top_groups`, `group_mask_value` of
            `route_tokens`.
    """

    def __init__(
        self, dim: int, hidden: int, experts: int, k: int, *, gated: bool = True, activation: str = "silu",
        bias: bool = False, shared_hidden: int = 0, shared_gate: bool = False, router_bias: bool = False,
        correction_bias: bool = False, router_dtype: Literal["model", "float32"] = "model", jitter: float = 0.0,
        capacity_factor: float | None = None, capacity_group: int | None = None, capacity_multiple: int = 4,
        capacity_priority: str = "order", dtype: torch.dtype | None = None,
        device: torch.device | str | None = None, **routing: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if router_dtype not in ("model", "float32"):
            raise ValueError(f"SparseMoE: router_dtype must be 'model' or 'float32', got {router_dtype!r}")
        if capacity_factor is None and capacity_group is not None:
            raise ValueError("SparseMoE: capacity_group needs a capacity_factor, got None")
        made = {"dtype": dtype, "device": device}
        self.k, self.activation, self.router_dtype, self.jitter = k, activation, router_dtype, jitter
        self.capacity_factor, self.capacity_group = capacity_factor, capacity_group
        self.capacity_multiple, self.capacity_priority = capacity_multiple, capacity_priority
        self.routing = routing
        self.gate = Router(experts, dim, router_bias, correction_bias, **made)
        self.experts = Experts(experts, dim, hidden, gated, bias, **made)
        self.shared_expert = Experts(1, dim, shared_hidden, True, False, **made) if shared_hidden else None
        self.shared_expert_gate = nn.Linear(dim, 1, bias=False, **made) if shared_gate else None
        self.register_load_state_dict_pre_hook(_read_published)
        self.reset_parameters()
        route_tokens(torch.zeros(0, experts), k, **routing)  # the options are checked here, not at the first call

    def reset_parameters(self) -> None:
        """Matrices uniform within 1 / sqrt(inputs), biases zero."""
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                continue
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                bound = max(parameter.shape[-1], 1) ** -0.5
                nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self, x: torch.Tensor, return_routing: bool = False
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The mixture of each token.

        Args:
            x: [..., D], dtype of the parameters.
            return_routing: return the router's work too.

        Returns:
            y, the shape and dtype of x; with `return_routing`: (y, logits [T, E], indices [T, k] int32, weights [T, k]
            float32) with T the product of the leading sizes.
        """
        rows = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        if self.jitter > 0 and self.training:
            rows = rows * torch.empty_like(rows).uniform_(1 - self.jitter, 1 + self.jitter)
        logits = self.score(rows)
        indices, weights = route_tokens(
            logits, self.k, bias=self.gate.e_score_correction_bias, **self.routing, **self.limits(rows.shape[0])
        )
        y = self.experts(rows, indices, weights, self.activation)
        if self.shared_expert is not None:
            y = y + self.share(rows)
        y = y if x.dim() == 2 else y.view(x.shape)
        return (y, logits, indices, weights) if return_routing else y

    def score(self, rows: torch.Tensor) -> torch.Tensor:
        """Logits [T, E] of the router, in the dtype of `rows` or float32."""
        logits = score_experts(rows, self.gate.weight, self.gate.bias)
        return logits.to(rows.dtype) if self.router_dtype == "model" else logits

    def limits(self, tokens: int) -> dict[str, Any]:
        """The capacity arguments of `route_tokens` for so many tokens."""
        if self.capacity_factor is None or tokens == 0:
            return {}
        group = self.capacity_group or tokens
        experts, multiple = self.gate.weight.shape[0], self.capacity_multiple
        capacity = expert_capacity(group, self.k, experts, self.capacity_factor, multiple_of=multiple)
        return {"capacity": capacity, "capacity_group": group, "capacity_priority": self.capacity_priority}

    def share(self, rows: torch.Tensor) -> torch.Tensor:
        """The shared expert of every token [T, D]."""
        assert self.shared_expert is not None
        indices = torch.zeros(rows.shape[0], 1, dtype=torch.int32, device=rows.device)
        if self.shared_expert_gate is None:
            weights = torch.ones(rows.shape[0], 1, dtype=torch.float32, device=rows.device)
        else:
            weights = score_experts(rows, self.shared_expert_gate.weight).sigmoid()
        return self.shared_expert(rows, indices, weights, self.activation)

    def extra_repr(self) -> str:
        """Sizes and options, as `print` shows them."""
        experts, dim = self.gate.weight.shape
        options = "".join(f", {name}={value!r}" for name, value in self.routing.items())
        return f"dim={dim}, experts={experts}, k={self.k}, activation={self.activation!r}{options}"

    @classmethod
    def from_mixtral(cls, source: nn.Module | Mapping[str, Any], **options: Any) -> "SparseMoE":
        """Mixtral: softmax, k best, renormalised; gated SiLU experts. A state dict needs `k`."""
        return convert.assemble(cls, read_layout, *convert.mixtral(source), options)

    @classmethod
    def from_qwen(cls, source: nn.Module | Mapping[str, Any], **options: Any) -> "SparseMoE":
        """Qwen2-MoE (gated shared expert) and Qwen3-MoE: softmax, k best. A state dict needs `k` and `renormalize`."""
        return convert.assemble(cls, read_layout, *convert.qwen(source), options)

    @classmethod
    def from_deepseek(cls, source: nn.Module | Mapping[str, Any], **options: Any) -> "SparseMoE":
        """DeepSeek-V3: float32 sigmoid, bias for the choice, groups, scale. A state dict needs `k`, `groups`,
        `top_groups`, `renormalize` and `scale`."""
        return convert.assemble(cls, read_layout, *convert.deepseek(source), options)

    @classmethod
    def from_vmoe(cls, source: Mapping[str, Any], **options: Any) -> "SparseMoE":
        """V-MoE: softmax over all experts, not renormalised; GELU (tanh) experts with biases. `source`: parameters of
        one MoE layer, Flax (nested or flat) or of SparseMoE; needs `k`. With `capacity_factor` (1.05 as published) and
        `capacity_group` tokens are dropped as in training."""
        return convert.assemble(cls, read_layout, *convert.vmoe(source), options)

    @classmethod
    def from_module(cls, module: nn.Module, **options: Any) -> "SparseMoE":
        """The layer of a published module, chosen by its class.

        Raises:
            ValueError: no conversion of that class.
        """
        constructor = convert.CLASSES.get(type(module).__name__)
        if constructor is None:
            known = ", ".join(convert.CLASSES)
            raise ValueError(f"SparseMoE: no conversion of {type(module).__name__}; there are {known}")
        return getattr(cls, constructor)(module, **options)


def _read_published(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Before loading: older names and layouts below `prefix` become those of the layer."""
    own = {name: state.pop(name) for name in [n for n in state if n.startswith(prefix)]}
    state |= {
        prefix + name: value for name, value in read_layout({n[len(prefix) :]: v for n, v in own.items()}).items()
    }


for _class, _constructor in convert.CLASSES.items():
    register_conversion(_class, getattr(SparseMoE, _constructor))
