"""Names and layouts in which published checkpoints hold a sparse mixture of experts, brought to those of SparseMoE."""

import re
from collections.abc import Mapping
from typing import Any

import torch

PARTS = {"w1": "gate", "gate_proj": "gate", "w3": "up", "up_proj": "up", "w2": "down", "down_proj": "down",
         "fc1": "up", "fc2": "down", "linear_fc1": "up", "linear_fc2": "down"}  # fmt: skip
EXPERT = re.compile(r"^experts\.(\d+)\.(\w+)\.(weight|bias)$")
SHARED = re.compile(r"^shared_experts?\.(\w+)\.weight$")
FLAX = re.compile(r"(?:^|[./])(?:Mlp[./]Dense_([01])|[Rr]outer[./]dense)[./](kernel|bias)$")


def read_layout(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of `state` under the names of SparseMoE; those that have them already come back as they are.

    Read are one matrix per expert (`experts.3.w1.weight`, `experts.3.gate_proj.weight`, `experts.3.fc1.weight`, with
    biases), separate shared matrices (`shared_expert.gate_proj.weight`, `shared_experts.up_proj.weight`) and Flax
    kernels with a leading expert axis (`Moe/Mlp/Dense_0/kernel` [E, D, F], `Moe/Router/dense/kernel` [D, E]), nested or
    flat; kernels are transposed.

    Raises:
        ValueError: an expert of the middle is missing, or a matrix without its partner.
    """
    made: dict[str, torch.Tensor] = {}
    experts: dict[tuple[str, str], dict[int, torch.Tensor]] = {}
    shared: dict[str, torch.Tensor] = {}
    for name, value in flatten(state).items():
        if found := EXPERT.match(name):
            if found[2] not in PARTS:
                raise ValueError(f"SparseMoE: no place for {name}; known parts are {', '.join(PARTS)}")
            experts.setdefault((PARTS[found[2]], found[3]), {})[int(found[1])] = value
        elif (found := SHARED.match(name)) and found[1] in PARTS:
            shared[PARTS[found[1]]] = value
        elif found := FLAX.search(name):
            made[_flax_name(found)] = value.mT.contiguous() if found[2] == "kernel" else value
        else:
            made[name] = value
    stacked = {key: _stack(key, matrices) for key, matrices in experts.items()}
    for kind, suffix in (("weight", ""), ("bias", "_bias")):
        parts = {part: tensor for (part, k), tensor in stacked.items() if k == kind}
        made |= _fuse("experts", parts, suffix)
    return made | _fuse("shared_expert", {part: matrix[None] for part, matrix in shared.items()}, "")


def flatten(state: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """Nested mappings and arrays as one level of tensors, names joined by dots."""
    flat: dict[str, torch.Tensor] = {}
    for name, value in state.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = torch.as_tensor(value)
    return flat


def _flax_name(found: re.Match[str]) -> str:
    if found[1] is None:
        return "gate.weight" if found[2] == "kernel" else "gate.bias"
    return f"experts.{'up' if found[1] == '0' else 'down'}_proj{'' if found[2] == 'kernel' else '_bias'}"


def _stack(key: tuple[str, str], matrices: dict[int, torch.Tensor]) -> torch.Tensor:
    missing = sorted(set(range(max(matrices) + 1)) - set(matrices))
    if missing:
        raise ValueError(f"SparseMoE: {key[0]} {key[1]} of expert {missing[0]} is missing")
    return torch.stack([matrices[e] for e in range(len(matrices))])


def _fuse(prefix: str, parts: dict[str, torch.Tensor], suffix: str) -> dict[str, torch.Tensor]:
    """Gate and up become one tensor, the gate's rows first."""
    if not parts:
        return {}
    if "up" not in parts or "down" not in parts:
        raise ValueError(f"SparseMoE: {prefix} needs up and down, got {', '.join(sorted(parts))}")
    if "gate" in parts:
        up = {f"{prefix}.gate_up_proj{suffix}": torch.cat([parts["gate"], parts["up"]], 1)}
    else:
        up = {f"{prefix}.up_proj{suffix}": parts["up"]}
    return up | {f"{prefix}.down_proj{suffix}": parts["down"]}
