"""Settings and weights of published layers: from the module, or from its state dict and what that does not say."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

Read = tuple[dict[str, Any], dict[str, torch.Tensor]]

FLA = ("q_proj.weight", "k_proj.weight", "v_proj.weight", "g_proj.weight", "o_proj.weight", "gk_proj.0.weight",
       "gk_proj.1.weight", "gk_proj.1.bias", "g_norm_swish_gate.weight")  # fmt: skip
VIG = ("in_proj.0.weight", "qkv_proj.weight", "gk_proj.0.weight", "gk_proj.1.weight", "gk_proj.1.bias",
       "g_proj.weight", "g_proj.bias", "o_proj.weight", "g_norm.weight", "l_norm.weight")  # fmt: skip


def weights_of(name: str, source: nn.Module | Mapping[str, torch.Tensor], heads: int | None, needed: tuple[str, ...],
               others: tuple[str, ...] = ()) -> tuple[int, dict[str, torch.Tensor]]:  # fmt: skip
    """The number of heads and the tensors; `others` may be there."""
    if isinstance(source, nn.Module):
        weights: dict[str, Any] = dict(source.named_parameters())
        heads = int(getattr(source, "num_heads", 0)) or heads
    else:
        weights = dict(source)
    if "g_norm.weight" in weights and "g_norm_swish_gate.weight" in needed:  # fla with fuse_norm=False
        weights["g_norm_swish_gate.weight"] = weights.pop("g_norm.weight")
    if heads is None:
        raise ValueError(f"{name}: heads must be given: a state dict does not say how many there are")
    missing = [key for key in needed if key not in weights]
    left = [key for key in weights if key not in (*needed, *others)]
    if missing or left:
        has, lacks = ", ".join(left) or "nothing", ", ".join(missing) or "nothing"
        raise ValueError(f"{name}: the source lacks {lacks}, and holds {has} that has no place here")
    return heads, weights


def read_fla(
    source: nn.Module | Mapping[str, torch.Tensor], heads: int | None, gate_divisor: float, clamp_min: float | None,
    eps: float,
) -> Read:  # fmt: skip
    """For `GatedLinearAttention`; a feature map, a short convolution or another activation has no place there."""
    name = "GatedLinearAttention.from_fla"
    if isinstance(source, nn.Module):
        if getattr(source, "feature_map_fn", None) is not None:
            raise ValueError(f"{name}: the source's feature map must be None, got {source.feature_map_fn}")
        if not isinstance(gate := getattr(source, "gate_fn", None), nn.SiLU | None) and "silu" not in str(gate):
            raise ValueError(f"{name}: the source's gate_fn must be swish, got {gate}")
        gate_divisor = float(getattr(source, "gate_logit_normalizer", gate_divisor))
        clamp_min = getattr(source, "clamp_min", clamp_min)
        norm = getattr(source, "g_norm_swish_gate", None) or getattr(source, "g_norm", None)
        eps = getattr(norm, "eps", eps)
    heads, weights = weights_of(name, source, heads, FLA)
    keys, dim = weights["q_proj.weight"].shape
    values = weights["g_proj.weight"].shape[0]
    kv_heads = heads * weights["k_proj.weight"].shape[0] // keys
    settings = {"dim": dim, "heads": heads, "key_ratio": keys / dim, "value_ratio": values / dim, "kv_heads": kv_heads}
    rank = weights["gk_proj.0.weight"].shape[0]
    return {**settings, "gate_rank": rank, "gate_divisor": gate_divisor, "clamp_min": clamp_min, "eps": eps}, weights


def read_vig(
    source: nn.Module | Mapping[str, torch.Tensor], heads: int | None, conv_activation: bool, out_activation: bool,
    gate_divisor: float, clamp_min: float | None, eps: float,
) -> Read:  # fmt: skip
    """For `ViGAttention`."""
    name = "ViGAttention.from_vig"
    if isinstance(source, nn.Module):
        conv_activation = not isinstance(source.get_submodule("in_proj")[1], nn.Identity)  # type: ignore[index]
        out_activation = hasattr(source, "out_act")
        gate_divisor = float(getattr(source, "gate_logit_normalizer", gate_divisor))
        clamp_min = getattr(source, "clamp_min", clamp_min)
        eps = getattr(source.get_submodule("g_norm"), "eps", eps)
    heads, weights = weights_of(name, source, heads, VIG, ("in_proj.0.bias",))
    rows, dim = weights["qkv_proj.weight"].shape
    settings = {"dim": dim, "heads": heads, "key_ratio": (rows - dim) / 2 / dim, "conv_activation": conv_activation}
    settings |= {"conv_bias": "in_proj.0.bias" in weights, "out_activation": out_activation, "eps": eps}
    rank = weights["gk_proj.0.weight"].shape[0]
    return {**settings, "gate_rank": rank, "gate_divisor": gate_divisor, "clamp_min": clamp_min}, weights
