"""accelerate: blocks of third-party models that Planmill has a layer for become that layer, with the same weights."""

import copy
from itertools import chain
from typing import NamedTuple

from torch import nn

from planmill.engine.errors import PlanError
from planmill.kernels import find_conversion


class Accelerated(NamedTuple):
    """What `accelerate` gives.

    Attributes:
        model: a twin of the model: other modules, the same parameters and buffers.
        replaced: names of the blocks that were replaced; "" is the model itself.
    """

    model: nn.Module
    replaced: list[str]


def accelerate(model: nn.Module) -> Accelerated:
    """A twin of a model in which every block that Planmill has a layer for is that layer.

    Replaced are the sparse mixture-of-experts blocks of transformers (Mixtral, Qwen2-MoE, Qwen3-MoE, DeepSeek-V3) and
    timm's HaloAttn: what `find_conversion` knows. The twin shares parameters and buffers with the model (training one
    trains the other), except where a layer keeps them in another layout. The model itself is not changed.

    Args:
        model: any module; blocks are known by their class.

    Returns:
        An Accelerated; `replaced` is empty where nothing is known.

    Raises:
        PlanError: a block that would be replaced has hooks, which its layer would not call.
    """
    tensors = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    twin = copy.deepcopy(model, dict(tensors))
    replaced: list[str] = []
    for name, module in list(twin.named_modules()):
        if any(name.startswith(f"{done}." if done else "") for done in replaced):
            continue  # inside a block that is gone
        convert = find_conversion(module)
        if convert is None:
            continue
        if module._forward_hooks or module._forward_pre_hooks:
            raise PlanError(f"{name or 'the model'}: has hooks, which its layer would not call: remove them first")
        layer = convert(module).train(module.training)
        replaced.append(name)
        if not name:
            return Accelerated(layer, replaced)
        parent, _, leaf = name.rpartition(".")
        setattr(twin.get_submodule(parent), leaf, layer)
    return Accelerated(twin, replaced)
