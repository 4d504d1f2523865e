"""Weights of the public soft mixtures, in this layer's names and layout."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

Read = tuple[dict[str, Any], dict[str, torch.Tensor]]


def _missing(source: str, name: str, names: list[str]) -> ValueError:
    return ValueError(f"SoftMoE: {source} must hold {name}, got {', '.join(names)}")


def read_soft_moe_pytorch(source: nn.Module | Mapping[str, torch.Tensor]) -> Read:
    """Settings and weights of soft-moe-pytorch's `SoftMoE`: one Linear pair an expert, GEGLU with the value first."""
    given = dict(source.state_dict() if isinstance(source, nn.Module) else source)
    if "slot_embeds" not in given:
        raise _missing("a soft-moe-pytorch state dict", "slot_embeds", sorted(given))
    experts, slots, dim = given["slot_embeds"].shape

    def stack(layer: str, kind: str) -> torch.Tensor:
        return torch.stack([given[f"experts.experts.{e}.{layer}.{kind}"].detach() for e in range(experts)])

    up, up_bias, down, down_bias = (stack(layer, kind) for layer in ("0", "3") for kind in ("weight", "bias"))
    hidden = down.shape[2]
    gated = up.shape[1] == 2 * hidden
    if gated:  # ours has the gate first
        up, up_bias = up.roll(hidden, 1), up_bias.roll(hidden, 1)
    form = "layer" if "norm.beta" in given else "rms"
    weights = {
        "slot_embeds": given["slot_embeds"],
        "gamma": given["norm.gamma"],
        "slot_gamma": given["slot_norm.gamma"],
    }
    if form == "layer":
        weights |= {"beta": given["norm.beta"], "slot_beta": given["slot_norm.beta"]}
    weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
    weights |= {"up": up, "up_bias": up_bias, "down": down, "down_bias": down_bias}
    settings = {"dim": dim, "experts": experts, "slots": slots, "hidden": hidden, "form": form, "gated": gated}
    return settings, weights


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def read_vmoe(tree: Mapping[str, Any]) -> Read:
    """Settings and weights of a vmoe block: `mu` [D, E, p], `scale`, and the two Dense layers of the experts."""
    leaves = dict(_leaves(tree))

    def find(name: str) -> torch.Tensor:
        found = [value for key, value in leaves.items() if f"/{key}".endswith(f"/{name}")]
        if len(found) != 1:
            raise _missing("a vmoe block", f"one {name}", sorted(leaves))
        return torch.as_tensor(found[0]).clone()

    mu, kernels = find("mu"), [find(f"Dense_{i}/kernel") for i in (0, 1)]
    dim, experts, slots = mu.shape
    weights = {
        "slot_embeds": mu.permute(1, 2, 0).contiguous(), "scale": find("scale"),
        "up": kernels[0].mT.contiguous(), "up_bias": find("Dense_0/bias"),
        "down": kernels[1].mT.contiguous(), "down_bias": find("Dense_1/bias"),
    }  # fmt: skip
    settings = {"dim": dim, "experts": experts, "slots": slots, "hidden": weights["down"].shape[2], "form": "l2",
                "activation": "gelu_tanh"}  # fmt: skip
    return settings, weights
