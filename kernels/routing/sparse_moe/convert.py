"""From a published module or state dict to the options and tensors of SparseMoE, one function per family."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from planmill.kernels.routing.sparse_moe.layer import SparseMoE

Parts = tuple[dict[str, Any], dict[str, Any], tuple[str, ...]]  # options, tensors, options a state dict leaves open
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh",
               "gelu_new": "gelu_tanh", "relu": "relu"}  # fmt: skip
CLASSES = {"MixtralSparseMoeBlock": "from_mixtral", "Qwen2MoeSparseMoeBlock": "from_qwen",
           "Qwen3MoeSparseMoeBlock": "from_qwen", "DeepseekV3MoE": "from_deepseek"}  # fmt: skip


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers by name, the objects themselves."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _activation(experts: Any) -> str:
    name = experts.config.hidden_act
    if name not in ACTIVATIONS:
        raise ValueError(f"SparseMoE: activation must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def mixtral(source: Any) -> Parts:
    """Softmax over the chosen; jitter in training."""
    options: dict[str, Any] = {"renormalize": True}
    if isinstance(source, Mapping):
        return options, dict(source), ("k",)
    options |= {"k": source.top_k, "jitter": source.jitter_noise, "activation": _activation(source.experts)}
    return options, tensors_of(source), ()


def qwen(source: Any) -> Parts:
    """Softmax over all experts, renormalised where the model says so."""
    if isinstance(source, Mapping):
        return {}, dict(source), ("k", "renormalize")
    gate = source.gate
    options = {"k": gate.top_k, "renormalize": gate.norm_topk_prob, "activation": _activation(source.experts)}
    return options, tensors_of(source), ()


def deepseek(source: Any) -> Parts:
    """Sigmoid, bias for the choice, groups; what is outside them is masked with -inf."""
    options: dict[str, Any] = {"score": "sigmoid", "eps": 1e-20, "router_dtype": "float32"}
    if isinstance(source, Mapping):
        return options, dict(source), ("k", "groups", "top_groups", "renormalize", "scale")
    gate = source.gate
    options |= {"k": gate.top_k, "groups": gate.num_group, "top_groups": gate.topk_group,
                "renormalize": gate.norm_topk_prob, "scale": gate.routed_scaling_factor,
                "activation": _activation(source.experts)}  # fmt: skip
    return options, tensors_of(source), ()


def vmoe(source: Any) -> Parts:
    """Softmax over all experts, not renormalised; GELU by tanh as Flax computes it."""
    return {"activation": "gelu_tanh"}, dict(source), ("k",)


def assemble(
    layer: type["SparseMoE"], read: Callable[..., dict[str, torch.Tensor]], known: dict[str, Any],
    source: Mapping[str, Any], needed: tuple[str, ...], given: dict[str, Any],
) -> "SparseMoE":  # fmt: skip
    """A layer of the sizes of the tensors, which become its parameters: the same objects where the layout is the same.

    Raises:
        ValueError: an option that a state dict does not hold is missing, a tensor is missing or does not fit.
    """
    options = {**known, **given}
    if missing := [name for name in needed if name not in options]:
        raise ValueError(f"SparseMoE: a state dict does not hold {', '.join(missing)}: give it as a keyword")
    tensors = _keep(source, read(source))
    gated = "experts.gate_up_proj" in tensors
    up_name = "experts.gate_up_proj" if gated else "experts.up_proj"
    for name in ("gate.weight", up_name, "experts.down_proj"):
        if name not in tensors:
            raise ValueError(f"SparseMoE: {name} is missing; there are {', '.join(sorted(tensors))}")
    (experts, dim), hidden = tensors["gate.weight"].shape, tensors["experts.down_proj"].shape[-1]
    shared = tensors.get("shared_expert.down_proj")
    made = layer(
        dim, hidden, experts, gated=gated, bias=up_name + "_bias" in tensors, router_bias="gate.bias" in tensors,
        shared_hidden=0 if shared is None else shared.shape[-1], shared_gate="shared_expert_gate.weight" in tensors,
        correction_bias="gate.e_score_correction_bias" in tensors, device="meta", **options,
    )  # fmt: skip
    _adopt(made, tensors, published=not needed)
    return made


def _keep(source: Mapping[str, Any], read: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was read, with the source's own objects (a Parameter stays that Parameter) where nothing was made new."""
    return {name: source[name] if isinstance(source.get(name), torch.Tensor) else value for name, value in read.items()}


def _adopt(layer: nn.Module, tensors: dict[str, torch.Tensor], published: bool) -> None:
    """`published`: the tensors are a module's own, and what is trained there is trained here."""
    places = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    if odd := sorted(set(places) ^ set(tensors)):
        verb = "is missing" if odd[0] in places else "has no place in the layer"
        raise ValueError(f"SparseMoE: {odd[0]} {verb}")
    for name, tensor in tensors.items():
        if tensor.shape != places[name].shape:
            raise ValueError(f"SparseMoE: {name} must be {list(places[name].shape)}, got {list(tensor.shape)}")
        holder_name, _, leaf = name.rpartition(".")
        holder = layer.get_submodule(holder_name)
        if name.endswith("e_score_correction_bias"):
            setattr(holder, leaf, tensor.detach() if tensor.dtype is torch.float32 else tensor.detach().float())
            continue
        trained = tensor.requires_grad or not published
        held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor.detach(), requires_grad=trained)
        setattr(holder, leaf, held)
