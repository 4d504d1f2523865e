"""Vision transformers of Hugging Face transformers, from a folder or from the user's cache. Nothing is downloaded."""

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from planmill.errors import PlanmillError
from planmill.inspection.backbones.common import Backbone, choose_layers, choose_size, name_some, read_weights

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HEADLESS = ("pooler.", "classifier.", "head.", "text_model.", "mask_token", "embeddings.mask_token")


class TransformersBackbone(nn.Module):
    """A transformers ViT: raw residual stream after the blocks `layers`, and its pooled descriptor."""

    def __init__(self, model: nn.Module, blocks: nn.ModuleList, layers: tuple[int, ...], patches: int) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.patches = patches
        self._blocks = [blocks[index] for index in layers]  # a plain list: the weights stay registered once
        takes = inspect.signature(model.forward).parameters
        self._options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    def forward(self, pictures: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
        """[N, 3, H, W] -> ([N, P, D] per layer, [N, E])."""
        kept: list[torch.Tensor] = []

        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            kept.append(output[0] if isinstance(output, tuple) else output)

        hooks = [block.register_forward_hook(keep) for block in self._blocks]
        try:
            output = self.model(pixel_values=pictures, **self._options)
        finally:
            for hook in hooks:
                hook.remove()
        descriptor = getattr(output, "image_embeds", None)
        if descriptor is None:
            descriptor = getattr(output, "pooler_output", None)
        if descriptor is None:
            descriptor = output.last_hidden_state[:, 0]
        return [tokens[:, -self.patches :] for tokens in kept], descriptor  # class and register tokens come first


def load_transformers_backbone(
    name: str, weights: Path | None, layers: Sequence[int] | None, size: int | None
) -> Backbone:
    """A transformers ViT by name or from a folder.

    Raises:
        PlanmillError: transformers is missing, no such model, no ViT, or its weights cannot be had.
    """
    transformers = _import_transformers()
    short = name.removeprefix("hf:")
    config = _config(transformers, name, short, weights)
    config = getattr(config, "vision_config", None) or config
    patch, depth = getattr(config, "patch_size", None), getattr(config, "num_hidden_layers", None)
    if not (isinstance(patch, int) and isinstance(depth, int)):
        raise PlanmillError(f"--backbone {name}: is no vision transformer of square patches ({config.model_type})")
    side, chosen = choose_size(patch, size), choose_layers(depth, layers)
    kind = {
        "clip_vision_model": "CLIPVisionModelWithProjection",
        "siglip_vision_model": "SiglipVisionModel",
    }.get(config.model_type, "AutoModel")
    model, origin = _load(getattr(transformers, kind), name, short, config, weights)
    blocks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not blocks:
        raise PlanmillError(f"--backbone {name}: its {depth} blocks cannot be found in {type(model).__name__}")
    grid = (side // patch, side // patch)
    mean, std = _normalization(transformers, short)
    return Backbone(
        module=TransformersBackbone(model.eval(), blocks[0], chosen, grid[0] * grid[1]).eval(),
        name=name,
        source=f"transformers {transformers.__version__}",
        weights=origin,
        layers=chosen,
        image_size=(side, side),
        grid=grid,
        mean=mean,
        std=std,
    )


def _config(transformers: ModuleType, name: str, short: str, weights: Path | None) -> Any:
    beside = weights.parent if weights is not None and (weights.parent / "config.json").is_file() else None
    try:
        return transformers.AutoConfig.from_pretrained(str(beside or short), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise _missing(name, short, "its config.json") from error


def _missing(name: str, short: str, what: str) -> PlanmillError:
    return PlanmillError(
        f"--backbone {name}: {what} is not in the cache, and nothing is downloaded here: run `hf download {short}` "
        "once, give a folder that holds the model as --backbone, or --weights FILE with config.json beside it"
    )


def _load(kind: Any, name: str, short: str, config: Any, weights: Path | None) -> tuple[nn.Module, str]:
    """The model with all its weights; a missing tensor is an error, never a random one."""
    options = {"config": config, "output_loading_info": True, "dtype": torch.float32}
    if weights is None:
        try:
            model, info = kind.from_pretrained(short, local_files_only=True, **options)
        except (OSError, ValueError) as error:
            raise _missing(name, short, "its weights") from error
        origin = short if Path(short).is_dir() else "the Hugging Face cache"
    else:
        state, origin = read_weights(weights), str(weights)
        mapping = getattr(kind, "_model_mapping", None)
        try:
            model, info = (kind if mapping is None else mapping[type(config)]).from_pretrained(
                None, state_dict=state, **options
            )
        except (RuntimeError, ValueError, KeyError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            raise PlanmillError(f"--backbone {name}: {weights} does not fit this model: {first}") from error
    missing = {*info["missing_keys"], *(str(entry[0]) for entry in info.get("mismatched_keys", ()))}
    absent = [key for key in missing if not key.removeprefix(f"{model.base_model_prefix}.").startswith(_HEADLESS)]
    if absent:
        raise PlanmillError(f"--backbone {name}: {origin} has no weights for {name_some(absent)}")
    if any("pooler." in key for key in missing) and hasattr(model, "pooler"):
        model.pooler = None  # an untrained pooler is no descriptor: the class token stands in
    return model.float(), origin


def _normalization(transformers: ModuleType, short: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of the model's own preprocessing; ImageNet's where it brings none."""
    from transformers.utils.hub import cached_file

    path = cached_file(
        short,
        "preprocessor_config.json",
        local_files_only=True,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if path is None:
        return _IMAGENET
    read = json.loads(Path(path).read_text(encoding="utf-8"))
    return tuple(read.get("image_mean", _IMAGENET[0])), tuple(read.get("image_std", _IMAGENET[1]))


def _import_transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise PlanmillError(f"transformers cannot be imported ({error}): pip install 'planmill[models]'") from error
    return transformers
